"""Teachers outside: our own server in a thread of this process, honest or with one fault."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import uvicorn
from safetensors.torch import load_file, save_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from streamopd.assets import resolve
from streamopd.assets.vocabulary import tokens
from streamopd.schemas import Array
from streamopd.schemas.teaching import PackedItem, PackedScore, Want
from streamopd.score.local import LocalTeacher
from streamopd.score.serve import TeacherServer

MODEL = "asset:quickstart-teacher"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def served(app: Any, port: int = 0, host: str = "127.0.0.1") -> Iterator[str]:
    """The address at which `app` answers, until the block ends."""
    port = port or free_port()
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), f"nothing listens on {port}"
        time.sleep(0.01)
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def honest(key: str = "", folder: str = MODEL, **info: Any) -> TeacherServer:
    return made(TeacherServer, key, folder, **info)


def made(kind: type[TeacherServer], key: str = "", folder: str = MODEL, **info: Any) -> TeacherServer:
    """A server of that kind over a model, the quickstart's teacher by name and, where no `folder` is given, by weights."""
    teacher = LocalTeacher(resolve(folder), "served", "float32", (), 512)
    table = tokens(resolve(folder))
    server = kind(teacher, MODEL, [table.get(i) for i in range(teacher.vocab_size)], key)
    server.info = msgspec.structs.replace(server.info, **info)
    return server


class Changed(TeacherServer):
    """Its scores are true, and then changed."""

    def change(self, score: PackedScore) -> PackedScore:
        raise NotImplementedError

    def score(self, items: Sequence[PackedItem], want: Want) -> list[PackedScore]:
        return [self.change(score) for score in super().score(items, want)]


class Shifted(Changed):
    """Every row speaks of the token before: a known bug of serving code."""

    by = 1

    def change(self, score: PackedScore) -> PackedScore:
        return each_column(score, lambda values: values[np.clip(np.arange(len(values)) - self.by, 0, len(values) - 1)])


class ShiftedEarly(Shifted):
    by = -1


class NotANumber(Changed):
    def change(self, score: PackedScore) -> PackedScore:
        return each_column(score, lambda values: np.full_like(values, np.nan) if values.dtype.kind == "f" else values)


class Short(Changed):
    def change(self, score: PackedScore) -> PackedScore:
        return each_column(score, lambda values: values[:-1])


class Deaf(TeacherServer):
    """The same answer, whatever was written."""

    def score(self, items: Sequence[PackedItem], want: Want) -> list[PackedScore]:
        fixed = [
            msgspec.structs.replace(item, completion_ids=Array.of(np.full(len(item.completion_ids), 5), "int32")) for item in items
        ]
        return super().score(fixed, want)


class Contextless(TeacherServer):
    """It scores the completion alone, behind a BOS."""

    def score(self, items: Sequence[PackedItem], want: Want) -> list[PackedScore]:
        return super().score([msgspec.structs.replace(item, context_ids=Array.of([1], "int32")) for item in items], want)


class Unsorted(TeacherServer):
    """Items of one length come back in another order."""

    def score(self, items: Sequence[PackedItem], want: Want) -> list[PackedScore]:
        scores, given = super().score(items, want), []
        by_length: dict[int, list[PackedScore]] = {}
        for score in scores:
            by_length.setdefault(len(score.logprobs), []).append(score)
        for item in items:
            given.append(by_length[len(item.completion_ids)].pop())
        return given


class Constant(TeacherServer):
    """Its distributions are those of the first row, whatever follows; its scores are right."""

    def score(self, items: Sequence[PackedItem], want: Want) -> list[PackedScore]:
        scores = super().score(items, want)
        fixed = ("vocab_logprobs",)
        return [each_column(score, lambda values: values[:1].repeat(len(values), 0), fixed) for score in scores]


class LeastLikely(TeacherServer):
    """Its own least likely ids instead of the most likely ones."""

    def score(self, items: Sequence[PackedItem], want: Want) -> list[PackedScore]:
        k = want.topk
        scores = super().score(items, msgspec.structs.replace(want, topk=self.info.vocab_size) if k else want)
        return [self.lowest(score, k) for score in scores] if k else scores

    def lowest(self, score: PackedScore, k: int) -> PackedScore:
        assert score.topk_ids is not None
        assert score.topk_logprobs is not None
        order = np.argsort(score.topk_logprobs.numpy(), 1)[:, :k]
        ids, logp = (np.take_along_axis(array.numpy(), order, 1) for array in (score.topk_ids, score.topk_logprobs))
        return msgspec.structs.replace(score, topk_ids=Array.of(ids, "int32"), topk_logprobs=Array.of(logp, "float32"))


class NoEntropy(Changed):
    """Only its entropies are not numbers."""

    def change(self, score: PackedScore) -> PackedScore:
        return each_column(score, lambda values: np.full_like(values, np.nan), ("entropy",))


class Noisy(Changed):
    """Another score at each call."""

    def change(self, score: PackedScore) -> PackedScore:
        moved = score.logprobs.numpy() - np.random.default_rng().uniform(0, 4, len(score.logprobs))
        return msgspec.structs.replace(score, logprobs=Array.of(moved, "float32"))


def each_column(score: PackedScore, change: Any, names: tuple[str, ...] = ()) -> PackedScore:
    """The score with every array changed, or those of `names`."""
    columns = {name: getattr(score, name) for name in names or score.__struct_fields__}
    changed = {
        name: Array.of(change(array.numpy().copy()), array.dtype) for name, array in columns.items() if array is not None
    }
    return msgspec.structs.replace(score, **changed)


def perturbed(folder: Path) -> str:
    """A folder with the quickstart teacher's files and other weights."""
    shutil.copytree(resolve(MODEL), folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    save_file({name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    return str(folder)


def replying(**answers: Any) -> Starlette:
    """A server that gives `info`, `vocabulary` and `score` as they are: a Response, or what makes one of a Request."""

    def route(path: str) -> Route:
        async def answer(request: Request) -> Response:
            given = answers[path]
            if isinstance(given, Response):
                return given
            return await given(request) if callable(given) else JSONResponse(given)

        return Route(f"/{path}", answer, methods=["GET", "POST"])

    return Starlette(routes=[route(path) for path in answers])


def redirect(to: str) -> RedirectResponse:
    return RedirectResponse(to, 307)


async def drip(request: Request) -> StreamingResponse:
    """One byte after another, without an end."""

    async def bytes_slowly() -> Any:
        while True:
            yield b" "
            await asyncio.sleep(0.2)

    return StreamingResponse(bytes_slowly(), media_type="application/json")
