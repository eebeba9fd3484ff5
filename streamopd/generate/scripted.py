"""The engine without a model: deterministic ids at a chosen pace, for exercising the protocol at speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import log
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from streamopd.schemas import Finish, Span, Weights

from .draws import uniforms
from .engine import Answer, Request, Swapped, error_answer


class _Row(Struct):
    request: Request
    ids: NDArray[np.int32]
    finish: Finish
    spans: list[Span]
    written: int = 0


class ScriptedEngine:
    """An Engine whose answers are drawn uniformly over `vocab_size` ids, or those of the model in `folder`.

    An answer is a pure function of its request's seed. `token_s` is slept a step, whatever is in flight, as a batched
    decode would take it. Weights change its version and nothing else, and their files are never opened.
    """

    def __init__(
        self,
        *,
        stop_ids: Sequence[int],
        max_inflight: int,
        folder: Path | None = None,
        vocab_size: int = 19,
        temperature: float = 1.0,
        top_p: float = 1.0,
        student_k: int = 0,
        token_s: float = 0.0,
    ) -> None:
        self.version = -1
        self._stop_ids = np.asarray(sorted(stop_ids), np.int32)
        self._slots = max_inflight
        self._vocab = _vocab_size(folder) if folder else vocab_size
        self._temperature, self._top_p = temperature, top_p
        self._k = min(student_k, self._vocab)
        self._token_s = token_s
        self._rows: list[_Row] = []
        self._refused: list[Answer] = []

    @property
    def inflight(self) -> int:
        return len(self._rows) + len(self._refused)

    @property
    def inflight_tokens(self) -> int:
        return sum(row.request.tokens for row in self._rows)

    @property
    def free(self) -> int:
        return self._slots - self.inflight

    def admit(self, requests: Sequence[Request]) -> None:
        assert len(requests) <= self.free, f"{len(requests)} requests for {self.free} free slots"
        assert not any(request.behaviour.author for request in requests), "this engine lets nobody but the student write"
        for request in requests:
            if len(request.prompt_ids) == 0 or request.max_new < 1:
                error = f"A request of {len(request.prompt_ids)} prompt tokens and at most {request.max_new} new ones."
                self._refused.append(error_answer(request, error, self._temperature, self._top_p))
            else:
                self._rows.append(self._script(request))

    def step(self) -> list[Answer]:
        answers, self._refused = self._refused, []
        if self._rows and self._token_s:
            time.sleep(self._token_s)
        for row in self._rows:
            if not row.written:
                row.spans = [Span(0, self.version)]
            row.written += 1
        answers += [self._answer(row) for row in self._rows if row.written == len(row.ids)]
        self._rows = [row for row in self._rows if row.written < len(row.ids)]
        return answers

    def prepare(self, manifest: Weights, weights_dir: Path) -> None:
        """Nothing is read."""

    def swap_in(self, manifest: Weights, weights_dir: Path) -> Swapped:
        self.version = manifest.n
        for row in self._rows:
            if row.spans and row.spans[-1].start == row.written:
                row.spans.pop()
            row.spans.append(Span(row.written, manifest.n))
        return Swapped(version=manifest.n, inflight=len(self._rows), pause_s=0.0)

    def probe(self, ids: list[int]) -> NDArray[np.float32]:
        return np.full(len(ids) - 1, -log(self._vocab), np.float32)

    def abort(self) -> list[Request]:
        dropped = [answer.request for answer in self._refused] + [row.request for row in self._rows]
        self._rows, self._refused = [], []
        return dropped

    def sleep(self) -> None:
        """Nothing is given back."""

    def wake(self) -> None:
        """Nothing was given back."""

    def _script(self, request: Request) -> _Row:
        ids = (uniforms(request.seed, request.max_new) * self._vocab).astype(np.int32)
        stops = np.flatnonzero(np.isin(ids, self._stop_ids))
        if len(stops):
            return _Row(request, ids[: stops[0] + 1], Finish.STOP, [])
        return _Row(request, ids, Finish.LENGTH, [])

    def _answer(self, row: _Row) -> Answer:
        length = len(row.ids)
        topk_ids, topk_logprobs = None, None
        if self._k:
            topk_ids = np.broadcast_to(np.arange(self._k, dtype=np.int32), (length, self._k))
            topk_logprobs = np.full((length, self._k), -log(self._vocab), np.float16)
        return Answer(
            request=row.request, completion_ids=row.ids, logprobs=np.full(length, -log(self._vocab), np.float32),
            spans=row.spans, finish=row.finish, temperature=self._temperature, top_p=self._top_p,
            topk_ids=topk_ids, topk_logprobs=topk_logprobs,
        )


def _vocab_size(folder: Path) -> int:
    config = msgspec.json.decode((folder / "config.json").read_bytes())
    return int(config.get("text_config", config)["vocab_size"])
