"""A local model as a teacher for other people's runs: our own server of the contract.

Shapes: N answer tokens of a chunk, V vocabulary, K top ids, S given ids.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any

import anyio
import numpy as np
import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from torch import Tensor

from streamopd.errors import GarbageRecord
from streamopd.schemas import Array
from streamopd.schemas.teaching import (
    CONTRACT_VERSION,
    JSON,
    MSGPACK,
    Complaint,
    PackedItem,
    PackedScore,
    Score,
    ScoreAnswer,
    TeacherInfo,
    Vocabulary,
    Want,
    read_request,
    write_message,
)
from streamopd.score.item import Item
from streamopd.score.local import LocalTeacher

MAX_REQUEST_BYTES = 64 << 20
MAX_ANSWER_NUMBERS = 64 << 20  # 256 MiB of float32


class TeacherServer:
    """`/info`, `/vocabulary` and `/score` over one model; one forward at a time."""

    def __init__(self, teacher: LocalTeacher, name: str, tokens: Sequence[str | None], key: str = "") -> None:
        self.teacher, self.key, self.vocabulary = teacher, key, Vocabulary(tokens=list(tokens))
        limit = getattr(teacher.model.config, "max_position_embeddings", None) or 1 << 20
        self.info = TeacherInfo(
            contract=CONTRACT_VERSION, model=name, vocab_size=teacher.vocab_size, max_tokens=min(limit, 1 << 20)
        )
        self._one_forward = anyio.Lock()

    @property
    def app(self) -> Starlette:
        """The server as an ASGI application."""
        return Starlette(routes=[
            Route("/info", self._tell_info), Route("/vocabulary", self._tell_vocabulary),
            Route("/score", self._tell_scores, methods=["POST"]),
        ])

    async def _tell_info(self, request: Request) -> Response:
        return self._refused(request) or _reply(request, self.info)

    async def _tell_vocabulary(self, request: Request) -> Response:
        return self._refused(request) or _reply(request, self.vocabulary)

    async def _tell_scores(self, request: Request) -> Response:
        """400 with a sentence for what cannot be scored, 413 for what is too much at once."""
        if refused := self._refused(request):
            return refused
        form = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if form not in (JSON, MSGPACK):
            return _complain(request, 415, f"Content-Type is {form}; this server reads {JSON} and {MSGPACK}")
        body = await _read_within(request, MAX_REQUEST_BYTES)
        if body is None:
            return _complain(request, 413, f"a request has at most {MAX_REQUEST_BYTES:,} bytes")
        try:
            asked = read_request(body, form, MAX_REQUEST_BYTES)
            async with self._one_forward:
                if await request.is_disconnected():  # whoever asked has given up: what waits longer than that must not pile up
                    return Response(status_code=499)
                scores = await run_in_threadpool(self.score, asked.items, asked.want)
        except TooMuch as error:
            return _complain(request, 413, str(error))
        except ValueError as error:
            return _complain(request, 400, str(error))
        return await run_in_threadpool(_reply, request, ScoreAnswer(scores=scores))

    def _refused(self, request: Request) -> Response | None:
        """401 without the key, where one is asked for."""
        given = request.headers.get("authorization", "").encode()
        if not self.key or hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            return None
        return _complain(request, 401, "the bearer token is missing or wrong")

    # ---------------------------------------------------------------- scoring
    def score(self, items: Sequence[PackedItem], want: Want) -> list[PackedScore]:
        """Scores in the order of the items; ValueError with the sentence for whoever asked."""
        asked = [self._item(number, item) for number, item in enumerate(items)]
        self._refuse_impossible(asked, want)
        found: dict[int, PackedScore] = {}
        for indices in self.teacher.micro_batches(asked):
            found |= zip(indices, self._score_batch([asked[i] for i in indices], want), strict=True)
        return [found[i] for i in range(len(asked))]

    def _item(self, number: int, item: PackedItem) -> Item:
        for name, ids in (("context_ids", item.context_ids), ("completion_ids", item.completion_ids)):
            if len(ids.shape) != 1 or not len(ids) or ids.dtype not in ("int32", "int64") or ids.numpy().min() < 0:
                raise GarbageRecord(f"item {number}: {name} is {ids.dtype}{list(ids.shape)}; it holds at least one id, none below 0")
        support = item.support_ids
        if support is not None and (len(support.shape) != 2 or support.shape[0] != len(item.completion_ids)):
            raise GarbageRecord(f"item {number}: support_ids are {list(support.shape)} for {len(item.completion_ids)} completion_ids")
        asked = Item(
            f"item {number}", item.context_ids.numpy(), item.completion_ids.numpy(), None if support is None else support.numpy()
        )
        self.teacher.check(asked)
        if asked.length > self.info.max_tokens:
            raise GarbageRecord(f"item {number} has {asked.length:,} tokens, this teacher takes {self.info.max_tokens:,}")
        return asked

    def _refuse_impossible(self, items: Sequence[Item], want: Want) -> None:
        wrong = [i for i in want.stop_ids if not 0 <= i < self.info.vocab_size]
        if wrong or want.topk < 0:
            raise GarbageRecord(f"stop_ids {wrong} and topk {want.topk} do not fit a vocabulary of {self.info.vocab_size}")
        given = max((item.support_ids.shape[1] for item in items if item.support_ids is not None), default=0)
        width = 3 + 2 * min(want.topk, self.info.vocab_size) + (self.info.vocab_size if want.whole else 0) + given
        numbers = width * sum(len(item.completion) for item in items)
        if numbers > MAX_ANSWER_NUMBERS:
            raise TooMuch(f"the answer would hold {numbers:,} numbers, at most {MAX_ANSWER_NUMBERS:,} are sent: ask for fewer items")

    @torch.inference_mode()
    def _score_batch(self, items: Sequence[Item], want: Want) -> list[PackedScore]:
        device = self.teacher.model.device
        completion_M = torch.from_numpy(np.concatenate([item.completion for item in items])).long().to(device)
        support_MS = _stacked([item.support_ids for item in items], [len(item.completion) for item in items]).to(device)
        seen: list[dict[str, Tensor]] = []
        for part, logp_NV in self.teacher.distributions(items):
            seen.append(_look(logp_NV, completion_M[part], support_MS[part], want))
        columns = {name: torch.cat([chunk[name] for chunk in seen]).cpu().numpy() for name in seen[0]}
        return list(_cut(items, columns))


class TooMuch(ValueError):
    """More at once than is answered; less is fine."""


def _look(logp_NV: Tensor, completion_N: Tensor, support_NS: Tensor, want: Want) -> dict[str, Tensor]:
    """The columns that were asked for, from whole distributions."""
    said = {"logprobs": logp_NV.gather(1, completion_N[:, None])[:, 0]}
    said["support_logprobs"] = logp_NV.gather(1, support_NS.clamp(min=0))
    if want.topk:
        top = logp_NV.topk(min(want.topk, logp_NV.shape[1]), sorted=False)
        said |= {"topk_ids": top.indices, "topk_logprobs": top.values}
    if want.whole:
        said["vocab_logprobs"] = logp_NV
    if want.entropy:
        said["entropy"] = -(logp_NV.exp() * logp_NV).sum(-1)
    if want.stop_ids:
        said["stop_logmass"] = logp_NV[:, want.stop_ids].logsumexp(-1).clamp(max=0.0)
    return said


def _cut(items: Sequence[Item], columns: dict[str, Any]) -> Any:
    """One score an item, from the columns of all."""
    start = 0
    for item in items:
        stop = start + len(item.completion)
        said = {name: values[start:stop] for name, values in columns.items()}
        support = said.pop("support_logprobs")
        if item.support_ids is not None:
            said["support_logprobs"] = support[:, : item.support_ids.shape[1]]
        yield Score(**{name: Array.of(values, "int32" if name.endswith("ids") else "float32") for name, values in said.items()})
        start = stop


def _stacked(rows: Sequence[Any], lengths: Sequence[int]) -> Tensor:
    """[M, S] the given ids of the items one after another, -1 where one gave fewer."""
    width = max((ids.shape[1] for ids in rows if ids is not None), default=0)
    stacked = np.full((sum(lengths), width), -1, np.int64)
    start = 0
    for ids, length in zip(rows, lengths, strict=True):
        if ids is not None:
            stacked[start : start + length, : ids.shape[1]] = ids
        start += length
    return torch.from_numpy(stacked)


# ---------------------------------------------------------------- HTTP
async def _read_within(request: Request, cap: int) -> bytes | None:
    """The body; None as soon as it is over `cap` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > cap:
            return None
    return bytes(body)


def _reply(request: Request, message: Any, status: int = 200) -> Response:
    form = MSGPACK if MSGPACK in request.headers.get("accept", "") else JSON
    return Response(write_message(message, form), status, media_type=form)


def _complain(request: Request, status: int, sentence: str) -> Response:
    """Always JSON: it is for people."""
    return Response(write_message(Complaint(error=sentence), JSON), status, media_type=JSON)
