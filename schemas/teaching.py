"""What a teacher outside the run is asked, and what it answers. One contract in two forms: JSON has lists, msgpack has Arrays.

Index law: everything about a completion has length G, and row g speaks of *predicting* completion token g.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct

from .array import Array
from .wire import MAX_RECORD_BYTES, decode, encode

CONTRACT_VERSION = 1
JSON, MSGPACK = "application/json", "application/msgpack"

Ids = TypeVar("Ids")        # int32 [G]
IdRows = TypeVar("IdRows")  # int32 [G, K]
Row = TypeVar("Row")        # float32 [G]
Rows = TypeVar("Rows")      # float32 [G, K]


class TeacherInfo(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`GET /info`: who teaches, and what can be asked."""

    contract: int            # CONTRACT_VERSION
    model: str               # for people
    vocab_size: int          # ids lie in [0, vocab_size); a head may be padded wider than its tokenizer
    max_tokens: int          # of one item: context and completion together
    max_topk: int = 0        # own top ids a token, at most; 0: any number, and the whole vocabulary; -1: none
    scores_ids: bool = True  # whether it can score ids that it is given (`support_ids`)


class Vocabulary(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`GET /vocabulary`: tokens[id], as the tokenizer's own table spells them; null where an id has no token."""

    tokens: list[str | None]


class Want(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What to say of each token beside its own log-prob, which always is."""

    topk: int = 0             # -> topk_ids, topk_logprobs
    whole: bool = False       # -> vocab_logprobs
    entropy: bool = False     # -> entropy
    stop_ids: list[int] = []  # -> stop_logmass


class ScoreItem(Struct, Generic[Ids, IdRows], frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One completion behind its context."""

    context_ids: Ids                    # [C], at least one
    completion_ids: Ids                 # [G], at least one
    support_ids: IdRows | None = None   # [G, S] ids to score at each token -> support_logprobs; -1 fills a row


class ScoreRequest(Struct, Generic[Ids, IdRows], frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """`POST /score`."""

    items: list[ScoreItem[Ids, IdRows]]
    want: Want = Want()


class Score(Struct, Generic[IdRows, Row, Rows], frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the teacher says of one item: natural log-probs, finite, at most 0; -10000 stands for "never"."""

    logprobs: Row                          # [G] of the completion's own ids
    topk_ids: IdRows | None = None         # [G, K] its own K most likely ids, in any order
    topk_logprobs: Rows | None = None      # [G, K]
    support_logprobs: Rows | None = None   # [G, S] of the item's support_ids; where those are -1 it does not matter
    vocab_logprobs: Rows | None = None     # [G, vocab_size]
    entropy: Row | None = None             # [G] nats; absent when it cannot be known
    stop_logmass: Row | None = None        # [G] log of the summed probability of the stop ids; absent when unknown


class ScoreAnswer(Struct, Generic[IdRows, Row, Rows], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scores in the order of the request's items."""

    scores: list[Score[IdRows, Row, Rows]]


class Complaint(Struct, frozen=True, kw_only=True):
    """The body of any answer that is not 200: one sentence for people, with both values where two disagree."""

    error: str


PackedItem = ScoreItem[Array, Array]
PackedRequest = ScoreRequest[Array, Array]
PackedScore = Score[Array, Array, Array]
PackedAnswer = ScoreAnswer[Array, Array, Array]
PlainRequest = ScoreRequest[list[int], list[list[int]]]
PlainAnswer = ScoreAnswer[list[list[int]], list[float], list[list[float]]]


def write_message(message: Any, form: str) -> bytes:
    """A message in one of the two forms."""
    return encode(message) if form == MSGPACK else msgspec.json.encode(_listed(message))


def read_request(body: bytes, form: str, max_bytes: int = MAX_RECORD_BYTES) -> PackedRequest:
    """A request of either form; ValueError says what is wrong with it."""
    if form == MSGPACK:
        return decode(PackedRequest, body, max_bytes)
    plain = read_json(PlainRequest, body, max_bytes)
    return ScoreRequest(items=[_arrayed(item) for item in plain.items], want=plain.want)


def read_answer(body: bytes, form: str, max_bytes: int = MAX_RECORD_BYTES) -> PackedAnswer:
    """An answer of either form; ValueError says what is wrong with it."""
    if form == MSGPACK:
        return decode(PackedAnswer, body, max_bytes)
    return ScoreAnswer(scores=[_arrayed(score) for score in read_json(PlainAnswer, body, max_bytes).scores])


def read_json(kind: Any, body: bytes, max_bytes: int = MAX_RECORD_BYTES) -> Any:
    """A `kind` from JSON; ValueError on what is over-size, mistyped, or no JSON."""
    if len(body) > max_bytes:
        raise ValueError(f"{len(body):,} bytes are over the cap of {max_bytes:,}")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:  # brackets in brackets, for ever
        raise ValueError(str(error)) from None


def _listed(message: Any) -> Any:
    """Arrays as lists, wherever they are."""
    if isinstance(message, Array):
        return message.numpy().tolist()
    if isinstance(message, list):
        return [_listed(part) for part in message]
    if isinstance(message, ScoreRequest | ScoreItem | ScoreAnswer | Score):
        fields = {name: _listed(getattr(message, name)) for name in message.__struct_fields__}
        return msgspec.structs.replace(message, **fields)
    return message


def _arrayed(record: Any) -> Any:
    """Lists as Arrays: ids int32, everything else float32."""
    fields = {name: getattr(record, name) for name in record.__struct_fields__}
    return msgspec.structs.replace(record, **{name: _array(name, value) for name, value in fields.items() if value is not None})


def _array(name: str, value: Any) -> Array:
    try:
        return Array.of(value, "int32" if name.endswith("ids") else "float32")
    except (ValueError, OverflowError) as error:  # rows of several lengths; an id beyond 32 bits
        raise ValueError(f"{name} is no array: {error}") from None
