"""Any OpenAI-compatible `/v1/completions` that echoes: a prompt of ids comes back with the log-prob of each.

Ids come out only where the server writes tokens as "token_id:N" (vLLM does, when asked). Elsewhere a text may stand for
several ids, so nothing but the prompt's own tokens is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from streamopd.schemas import Array
from streamopd.schemas.teaching import CONTRACT_VERSION, PackedItem, PackedScore, Score, TeacherInfo, Vocabulary, Want

from . import Server
from .measure import MOST_TOPK, PAIR, Listed, Measured, id_rows, largest, prompt_of, require_ids, takes, texts, the_model

COMPLETIONS = "/v1/completions"
CELL_BYTES = 120
ROOM_BYTES = 64 << 10
ID = "token_id:"


class Columns(Struct, frozen=True):
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(Struct, frozen=True):
    logprobs: Columns | None = None
    index: int = 0


class Choices(Struct, frozen=True):
    choices: list[Choice]


class Completions(Measured):
    """The API of one server and one of its models."""

    async def _measured(self, server: Server, listed: Listed) -> TeacherInfo:
        """Whether ids come out, and which top-k it takes; of ids it is held to the student's."""
        require_ids(server, await takes(server, COMPLETIONS, self._echo([[0, self._ids - 1]], 1, True)), self._ids)
        (pair,) = await self._ask(server, [PAIR], 1, ids=True)
        cap = -1
        if all(token.startswith(ID) for token in pair.tokens):
            cap = await largest(lambda k: takes(server, COMPLETIONS, self._echo([PAIR], k, True), MOST_TOPK * CELL_BYTES), MOST_TOPK) or -1
        return TeacherInfo(
            contract=CONTRACT_VERSION, model=listed.id, vocab_size=self._ids, max_tokens=listed.room, max_topk=cap, scores_ids=False
        )

    async def vocabulary(self, server: Server, ids: Sequence[int]) -> Vocabulary:
        async def ask(chunk: list[int]) -> list[str]:
            (columns,) = await self._ask(server, [chunk], 1, ids=False)
            return columns.tokens

        return await texts(server, ids, (await the_model(server, self._model)).room, ask)

    async def score(self, server: Server, items: Sequence[PackedItem], want: Want, vocab_size: int) -> Sequence[PackedScore]:
        prompts = [prompt_of(item) for item in items]
        answers = await self._ask(server, prompts, max(1, want.topk), ids=True)
        return [_score(server, item, columns, want.topk, vocab_size) for item, columns in zip(items, answers, strict=True)]

    async def _ask(self, server: Server, prompts: list[list[int]], k: int, ids: bool) -> list[Columns]:
        """Columns over each prompt."""
        cap = ROOM_BYTES + sum(map(len, prompts)) * (k + 3) * CELL_BYTES
        answer = await server.read(Choices, "POST", COMPLETIONS, self._echo(prompts, k, ids), cap)
        found = [choice.logprobs for choice in sorted(answer.choices, key=lambda choice: choice.index) if choice.logprobs]
        if len(found) != len(prompts):
            raise server.garbage(f"gave log-probs of {len(found)} prompts, asked were {len(prompts)}: it must echo with logprobs")
        for columns, prompt in zip(found, prompts, strict=True):
            lengths = (len(columns.tokens), len(columns.token_logprobs))
            if lengths != (len(prompt), len(prompt)):
                raise server.garbage(f"gave {lengths[0]} tokens with {lengths[1]} log-probs for a prompt of {len(prompt)} ids")
        return found

    def _echo(self, prompts: list[list[int]], k: int, ids: bool) -> dict[str, Any]:
        request = {"model": self._model, "prompt": prompts, "max_tokens": 0, "temperature": 0, "echo": True, "logprobs": k}
        return request | ({"return_tokens_as_token_ids": True} if ids else {})


def _score(server: Server, item: PackedItem, columns: Columns, k: int, vocab_size: int) -> PackedScore:
    length, own = len(item.completion_ids), [f"{ID}{i}" for i in item.completion_ids.numpy().tolist()]
    if k and columns.tokens[-length:] != own:
        raise server.garbage(f"echoed {columns.tokens[-length:][:8]}…, asked were {own[:8]}…")
    logp = columns.token_logprobs[-length:]
    if None in logp:
        raise server.garbage(f"gave no log-prob of token {logp.index(None)} of an answer of {length}")
    sampled = Array.of(logp, "float32")
    if not k:
        return Score(logprobs=sampled)
    rows = (columns.top_logprobs or [])[-length:]
    best = [sorted((row or {}).items(), key=lambda pair: -pair[1])[:k] for row in rows]
    if [len(row) for row in best] != [k] * length:
        raise server.garbage(f"gave {[len(row) for row in best][:8]}… top ids a token, asked were {k} for each of {length}")
    try:
        ids = [[int(token.removeprefix(ID)) for token, _ in row] for row in best]
    except ValueError as error:
        raise server.garbage(f"named a token without its id: {error}") from None
    topk_logp = Array.of([[value for _, value in row] for row in best], "float32")
    return Score(logprobs=sampled, topk_ids=id_rows(server, ids, vocab_size), topk_logprobs=topk_logp)
