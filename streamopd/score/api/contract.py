"""streamopd's own contract: schemas/contract/teacher.md. It is spoken in the form that the server's `/info` came in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamopd.schemas.teaching import (
    JSON,
    MSGPACK,
    PackedItem,
    PackedScore,
    ScoreRequest,
    TeacherInfo,
    Vocabulary,
    Want,
    read_answer,
    read_json,
    write_message,
)
from streamopd.schemas.wire import decode

from . import Server

NUMBER_BYTES = {JSON: 40, MSGPACK: 8}  # one number is shorter
ROOM_BYTES = 64 << 10               # names, brackets
MAX_VOCABULARY_BYTES = 64 << 20


class Contract:
    """`GET /info`, `GET /vocabulary`, `POST /score`."""

    spells = True

    def __init__(self) -> None:
        self._form = JSON

    async def meet(self, server: Server) -> TeacherInfo:
        body, self._form = await server.ask("GET", "/info", None, ROOM_BYTES)
        info: TeacherInfo = _read(server, TeacherInfo, body, self._form)
        return info

    async def vocabulary(self, server: Server, ids: Sequence[int]) -> Vocabulary:
        body, form = await server.ask("GET", "/vocabulary", None, MAX_VOCABULARY_BYTES)
        vocabulary: Vocabulary = _read(server, Vocabulary, body, form)
        return vocabulary

    async def score(self, server: Server, items: Sequence[PackedItem], want: Want, vocab_size: int) -> Sequence[PackedScore]:
        cap = ROOM_BYTES + NUMBER_BYTES[self._form] * sum(_numbers(item, want, vocab_size) for item in items)
        request = write_message(ScoreRequest(items=list(items), want=want), self._form)
        body, form = await server.ask("POST", "/score", request, cap, self._form)
        try:
            scores = read_answer(body, form, cap).scores
        except ValueError as error:
            raise server.garbage(f"answered what is no answer of the contract: {error}") from None
        if len(scores) != len(items):
            raise server.garbage(f"gave {len(scores)} scores for {len(items)} items")
        return scores


def _read(server: Server, kind: Any, body: bytes, form: str) -> Any:
    try:
        return decode(kind, body) if form == MSGPACK else read_json(kind, body)
    except ValueError as error:
        raise server.away(f"answered what is no {kind.__name__}: {error}") from None


def _numbers(item: PackedItem, want: Want, vocab_size: int) -> int:
    """How many numbers the answer to an item holds."""
    support = item.support_ids.shape[1] if item.support_ids is not None else 0
    columns = 3 + 2 * want.topk + support + (vocab_size if want.whole else 0)
    return len(item.completion_ids) * columns + 64
