"""An SGLang server, by its own `/generate`: log-probs of a prompt's ids and of the most likely ids at each.

It scores given ids only when they are the same at every token, so the student's own are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from streamopd.schemas import Array
from streamopd.schemas.teaching import CONTRACT_VERSION, PackedItem, PackedScore, Score, TeacherInfo, Vocabulary, Want

from . import Server
from .measure import MOST_TOPK, PAIR, Listed, Measured, id_rows, largest, prompt_of, require_ids, takes, texts, the_model

GENERATE = "/generate"
TRIPLE_BYTES = 120       # [log-prob, id, text]
ROOM_BYTES = 64 << 10
NEVER = -1e4

Triple = tuple[float | None, int, str | None]


class Meta(Struct, frozen=True):
    input_token_logprobs: list[Triple] = []
    input_top_logprobs: list[list[Triple] | None] | None = None


class Generated(Struct, frozen=True):
    meta_info: Meta


class SGLang(Measured):
    """The API of one server."""

    async def _measured(self, server: Server, listed: Listed) -> TeacherInfo:
        """The top-k that it takes; of ids it is held to the student's."""
        require_ids(server, await takes(server, GENERATE, _request([[0, self._ids - 1]], 0, 0)), self._ids)
        most = min(MOST_TOPK, self._ids)
        cap = await largest(lambda k: takes(server, GENERATE, _request([PAIR], 0, k), MOST_TOPK * TRIPLE_BYTES), most)
        return TeacherInfo(
            contract=CONTRACT_VERSION, model=listed.id, vocab_size=self._ids, max_tokens=listed.room,
            max_topk=0 if cap == self._ids else cap or -1, scores_ids=False,
        )

    async def vocabulary(self, server: Server, ids: Sequence[int]) -> Vocabulary:
        async def ask(chunk: list[int]) -> list[str | None]:
            metas = await self._ask(server, [chunk], 0, 0, len(chunk))
            return [text for meta in metas for _, _, text in meta.input_token_logprobs]

        return await texts(server, ids, (await the_model(server, self._model)).room, ask)

    async def score(self, server: Server, items: Sequence[PackedItem], want: Want, vocab_size: int) -> Sequence[PackedScore]:
        prompts = [prompt_of(item) for item in items]
        k = vocab_size if want.whole else want.topk
        first = min(len(item.context_ids) for item in items) - 1
        metas = await self._ask(server, prompts, first, k, sum(map(len, prompts)) * (k + 1))
        if len(metas) != len(items):
            raise server.garbage(f"gave {len(metas)} answers for {len(items)} prompts")
        return [_score(server, item, meta, want.whole, k, vocab_size) for item, meta in zip(items, metas, strict=True)]

    async def _ask(self, server: Server, prompts: list[list[int]], first: int, k: int, cells: int) -> list[Meta]:
        cap = ROOM_BYTES + cells * TRIPLE_BYTES
        answers = await server.read(list[Generated], "POST", GENERATE, _request(prompts, first, k), cap)
        return [answer.meta_info for answer in answers]


def _request(prompts: list[list[int]], first: int, k: int) -> dict[str, Any]:
    return {
        "input_ids": prompts, "sampling_params": {"max_new_tokens": 1, "temperature": 0}, "return_logprob": True,
        "logprob_start_len": first, "top_logprobs_num": k, "return_text_in_logprobs": True,
    }


def _score(server: Server, item: PackedItem, meta: Meta, whole: bool, k: int, vocab_size: int) -> PackedScore:
    own = item.completion_ids.numpy().tolist()
    said = meta.input_token_logprobs[-len(own) :]
    if [index for _, index, _ in said] != own:
        raise server.garbage(f"gave log-probs of ids {[index for _, index, _ in said][:8]}…, asked were {own[:8]}…")
    sampled = Array.of([_number(logp) for logp, _, _ in said], "float32")
    if not k:
        return Score(logprobs=sampled)
    rows = [sorted(row or [], key=lambda triple: triple[1] if whole else 0) for row in (meta.input_top_logprobs or [])[-len(own) :]]
    if [len(row) for row in rows] != [k] * len(own):
        raise server.garbage(f"gave {[len(row) for row in rows][:8]}… top ids a token, asked were {k} for each of {len(own)}")
    logp = Array.of([[_number(triple[0]) for triple in row] for row in rows], "float32")
    if not whole:
        ids = id_rows(server, [[triple[1] for triple in row] for row in rows], vocab_size)
        return Score(logprobs=sampled, topk_ids=ids, topk_logprobs=logp)
    if any([triple[1] for triple in row] != list(range(k)) for row in rows):
        raise server.garbage(f"did not name each of the {k} ids of its vocabulary once")
    return Score(logprobs=sampled, vocab_logprobs=logp)


def _number(value: float | None) -> float:
    """JSON has no minus infinity; what is told as none, behind the first token, is never."""
    return NEVER if value is None else value
