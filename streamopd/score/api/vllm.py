"""A vLLM server as it is started by `vllm serve`: prompt log-probs of ids, by `/v1/completions`.

Ids that a student chose are scored where the server does so: `prompt_logprob_token_ids` of `/inference/v1/generate`, which
wants vLLM >= 0.32 with its second model runner and `--enable-scale-out`.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from streamopd.schemas import Array
from streamopd.schemas.teaching import CONTRACT_VERSION, PackedItem, PackedScore, Score, TeacherInfo, Vocabulary, Want

from . import Server
from .measure import MOST_IDS, MOST_TOPK, PAIR, Listed, Measured, id_rows, largest, prompt_of, takes, texts, the_model

COMPLETIONS, GENERATE = "/v1/completions", "/inference/v1/generate"
ENTRY_BYTES = 160        # one id with its log-prob, rank and text
ROOM_BYTES = 64 << 10
WIDE = 24                # ids a token, tried at the start: its own, the student's 16, the stop ids
AT_ONCE = 8              # prompts of one batch with ids of their own

Table = list[dict[int, "Entry"] | None]  # a row a token of a prompt: its own entry, and those of the most likely ids


class Entry(Struct, frozen=True):
    logprob: float
    decoded_token: str | None = None


class Choice(Struct, frozen=True):
    index: int
    prompt_logprobs: list[dict[int, Entry] | None] | None = None


class Choices(Struct, frozen=True):
    choices: list[Choice]


class Generated(Struct, frozen=True):
    prompt_logprobs: list[dict[int, Entry] | None] | None = None
    prompt_token_id_logprobs: str | None = None  # base64 of a .npy, [rows, ids]


class Vllm(Measured):
    """The API of one server and one of its models."""

    async def _measured(self, server: Server, listed: Listed) -> TeacherInfo:
        """Which top-k it takes, which ids there are, whether it scores ids that it is given."""
        if await takes(server, COMPLETIONS, self._prompts([PAIR], -1), MOST_IDS * ENTRY_BYTES):
            rows = await self._prompt_logprobs(server, [PAIR], -1, MOST_IDS)
            vocab_size, cap = len(rows[0][1] or ()), 0
        else:
            vocab_size = 1 + await largest(lambda i: takes(server, COMPLETIONS, self._prompts([[0, i]], 0)), MOST_IDS)
            cap = await largest(lambda k: takes(server, COMPLETIONS, self._prompts([PAIR], k)), MOST_TOPK) or -1
        return TeacherInfo(
            contract=CONTRACT_VERSION, model=listed.id, vocab_size=vocab_size, max_tokens=listed.room, max_topk=cap,
            scores_ids=await self._scores_given(server, min(WIDE, vocab_size)),
        )

    async def _scores_given(self, server: Server, width: int) -> bool:
        """As many ids a token as a method may ask about; a server that knows the address and not the request answers without them."""
        body = await server.attempt(GENERATE, self._given(PAIR, [list(range(width))], 0, 0), no=(400, 403, 404, 405, 422, 501))
        return body is not None and b'"prompt_token_id_logprobs":"' in body.replace(b" ", b"")

    async def vocabulary(self, server: Server, ids: Sequence[int]) -> Vocabulary:
        async def ask(chunk: list[int]) -> list[str | None]:
            (table,) = await self._prompt_logprobs(server, [[chunk[0], *chunk]], 0, len(chunk) + 1)
            return [row[index].decoded_token if row and index in row else None for index, row in zip(chunk, table[1:], strict=True)]

        return await texts(server, ids, (await the_model(server, self._model)).room, ask)

    async def score(self, server: Server, items: Sequence[PackedItem], want: Want, vocab_size: int) -> Sequence[PackedScore]:
        if any(item.support_ids is not None for item in items):
            return await self._score_all_given(server, items, want, vocab_size)
        prompts = [prompt_of(item) for item in items]
        cells = sum(map(len, prompts)) * (vocab_size if want.whole else want.topk + 1)
        tables = await self._prompt_logprobs(server, prompts, -1 if want.whole else want.topk, cells)
        return [_score(server, item, table, want, vocab_size) for item, table in zip(items, tables, strict=True)]

    async def _score_all_given(self, server: Server, items: Sequence[PackedItem], want: Want, vocab_size: int) -> list[PackedScore]:
        at_once = asyncio.Semaphore(AT_ONCE)

        async def one(item: PackedItem) -> PackedScore:
            async with at_once:
                return await self._score_given(server, item, want, vocab_size)

        try:
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(one(item)) for item in items]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in asked]

    async def _score_given(self, server: Server, item: PackedItem, want: Want, vocab_size: int) -> PackedScore:
        """Its own token, the ids that are given and the stop ids, in one row a token."""
        own_G1 = item.completion_ids.numpy()[:, None]
        given_GS = np.empty((len(own_G1), 0), np.int32) if item.support_ids is None else item.support_ids.numpy()
        stops_GE = np.tile(np.array(want.stop_ids, np.int32), (len(own_G1), 1))
        asked = np.concatenate([own_G1, given_GS, stops_GE], 1)
        prompt, first = prompt_of(item), len(item.context_ids) - 1
        cap = ROOM_BYTES + asked.size * 8 + len(prompt) * (want.topk + 1) * ENTRY_BYTES
        answer = await server.read(Generated, "POST", GENERATE, self._given(prompt, asked.tolist(), first, want.topk), cap)
        said = _array(server, answer.prompt_token_id_logprobs, asked.shape)
        top_ids, top_logp = _topk(server, item, answer.prompt_logprobs, want.topk, vocab_size) if want.topk else (None, None)
        width = given_GS.shape[1]
        return Score(
            logprobs=Array.of(said[:, 0], "float32"), topk_ids=top_ids, topk_logprobs=top_logp,
            support_logprobs=Array.of(np.where(given_GS < 0, 0, said[:, 1 : 1 + width]), "float32") if width else None,
            stop_logmass=Array.of(np.logaddexp.reduce(said[:, 1 + width :], 1), "float32") if want.stop_ids else None,
        )

    async def _prompt_logprobs(self, server: Server, prompts: list[list[int]], k: int, cells: int) -> list[Table]:
        """A table a prompt; an answer has at most `cells` entries."""
        answer = await server.read(Choices, "POST", COMPLETIONS, self._prompts(prompts, k), ROOM_BYTES + cells * ENTRY_BYTES)
        tables = [choice.prompt_logprobs or [] for choice in sorted(answer.choices, key=lambda choice: choice.index)]
        if [len(table) for table in tables] != [len(prompt) for prompt in prompts]:
            raise server.garbage(f"gave prompt_logprobs of lengths {[len(t) for t in tables]} for prompts of {[len(p) for p in prompts]}")
        return tables

    def _prompts(self, prompts: list[list[int]], k: int) -> dict[str, Any]:
        return {"model": self._model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "prompt_logprobs": k}

    def _given(self, prompt: list[int], rows: list[list[int]], first: int, k: int) -> dict[str, Any]:
        sampling = {"max_tokens": 1, "temperature": 0, "detokenize": False, "prompt_logprob_token_ids": rows, "prompt_logprob_start": first}
        return {"model": self._model, "token_ids": prompt, "sampling_params": sampling | ({"prompt_logprobs": k} if k else {})}


def _score(server: Server, item: PackedItem, table: Table, want: Want, vocab_size: int) -> PackedScore:
    rows, own = _rows(server, item, table), item.completion_ids.numpy().tolist()
    sampled = Array.of([row[i].logprob for row, i in zip(rows, own, strict=True)], "float32")
    if want.whole:
        return Score(logprobs=sampled, vocab_logprobs=_whole(server, rows, vocab_size))
    ids, logp = _topk(server, item, table, want.topk, vocab_size) if want.topk else (None, None)
    return Score(logprobs=sampled, topk_ids=ids, topk_logprobs=logp)


def _rows(server: Server, item: PackedItem, table: Table | None) -> list[dict[int, Entry]]:
    """[G] the rows of the completion, each with an entry for its own token."""
    own = item.completion_ids.numpy().tolist()
    rows = [row or {} for row in (table or [])[-len(own) :]]
    if len(rows) != len(own):
        raise server.garbage(f"gave {len(rows)} rows for an answer of {len(own)} tokens")
    missing = next((g for g, row in enumerate(rows) if own[g] not in row), None)
    if missing is not None:
        raise server.garbage(f"has no log-prob of id {own[missing]}, which is token {missing} of an answer of {len(own)}")
    return rows


def _topk(server: Server, item: PackedItem, table: Table | None, k: int, vocab_size: int) -> tuple[Array, Array]:
    """([G, k], [G, k]) the most likely of each row: a row also names its own token, which may be less likely than these."""
    best = [sorted(row.items(), key=lambda pair: -pair[1].logprob)[:k] for row in _rows(server, item, table)]
    short = next((len(row) for row in best if len(row) < k), None)
    if short is not None:
        raise server.garbage(f"gave {short} top ids for a token, asked were {k}")
    return (
        id_rows(server, [[index for index, _ in row] for row in best], vocab_size),
        Array.of([[entry.logprob for _, entry in row] for row in best], "float32"),
    )


def _whole(server: Server, rows: list[dict[int, Entry]], vocab_size: int) -> Array:
    table = np.full((len(rows), vocab_size), np.nan, np.float32)  # an id that is not told is refused where the answer is checked
    for g, row in enumerate(rows):
        table[g, id_rows(server, [list(row)], vocab_size).numpy()[0]] = [entry.logprob for entry in row.values()]
    return Array.of(table, "float32")


def _array(server: Server, text: str | None, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A .npy of float32 and nothing else: its header is read before any memory is taken for it."""
    try:
        body = base64.b64decode(text or "", validate=True)
        stream = io.BytesIO(body)
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        told, fortran, kind = read_header(stream)
    except (ValueError, EOFError) as error:
        raise server.garbage(f"gave prompt_token_id_logprobs that are no array: {error}") from None
    rest = body[stream.tell() :]
    if (told, fortran, kind) != (shape, False, np.dtype("<f4")) or len(rest) != 4 * int(np.prod(shape)):
        raise server.garbage(f"gave prompt_token_id_logprobs of {kind}{list(told)}, {len(rest)} bytes; asked were {list(shape)} of float32")
    return np.frombuffer(rest, "<f4").reshape(shape)
