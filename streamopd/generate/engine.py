"""What every engine is: requests in, one decode step at a time, answers out, new weights between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from streamopd.schemas import Array, Author, Finish, Outcome, Rollout, Span, TopK, Weights
from streamopd.slots import Behaviour, Coin, Members, OnPolicy, Until


class Request(Struct, frozen=True):
    """One answer to write. The answer is a pure function of it and of the weights, whatever else is in flight."""

    id: str                              # the rollout's
    prompt_ids: NDArray[np.int32]        # [P], P >= 1
    seed: tuple[int, ...]                # non-negative integers
    max_new: int                         # tokens at most
    behaviour: Behaviour = OnPolicy()    # of this one answer: what concerns a group is settled before, see commission.py
    teacher_prompt_ids: NDArray[np.int32] | None = None  # [Q], Q >= 1  what a teacher that writes sees; None: prompt_ids
    gold_ids: NDArray[np.int32] | None = None            # [max_new]  what is written whatever the student would; None: it is free

    def __post_init__(self) -> None:
        whole = isinstance(self.behaviour, Until | Members) or (isinstance(self.behaviour, Coin) and self.behaviour.student != 0)
        assert not whole, f"{self.behaviour} is of a group, not of one answer"
        assert (self.behaviour.author == "gold") == (self.gold_ids is not None), f"{self.behaviour}, and gold is {self.gold_ids}"

    @property
    def tokens(self) -> int:
        """Of prompt and completion, at most."""
        return len(self.prompt_ids) + self.max_new

    @property
    def context_ids(self) -> NDArray[np.int32]:
        """What the teacher sees."""
        return self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids


class Answer(Struct, frozen=True, kw_only=True):
    """A finished request. Arrays have length G and speak of predicting token g."""

    request: Request
    completion_ids: NDArray[np.int32]    # [G]  the stop id included when finish is STOP
    logprobs: NDArray[np.float32]        # [G]  of the kernel that sampled
    spans: list[Span]
    finish: Finish
    temperature: float
    top_p: float
    topk_ids: NDArray[np.int32] | None = None        # [G, k]  most probable first
    topk_logprobs: NDArray[np.float16] | None = None  # [G, k]  at temperature 1 and without top-p, whatever sampled
    error: str = ""                      # why, when finish is ERROR
    authors: list[Author] = []           # who wrote which tokens; [] = the student all of them

    def rollout(self, outcome: Outcome | None = None) -> Rollout:
        """The record of this answer."""
        return Rollout(
            id=self.request.id,
            prompt_ids=Array.of(self.request.prompt_ids, "int32"),
            completion_ids=Array.of(self.completion_ids, "int32"),
            logprobs=Array.of(self.logprobs, "float32"),
            weight_spans=self.spans,
            finish=self.finish,
            temperature=self.temperature,
            top_p=self.top_p,
            student_topk=self._student_topk(),
            outcome=outcome,
            error=self.error,
            authors=self.authors,
        )

    def _student_topk(self) -> TopK | None:
        if self.topk_ids is None or self.topk_logprobs is None:
            return None
        return TopK(Array.of(self.topk_ids, "int32"), Array.of(self.topk_logprobs, "float16"))


class Swapped(Struct, frozen=True, kw_only=True):
    """One swap: no token was written for `pause_s`."""

    version: int
    inflight: int            # answers that were under way and go on
    pause_s: float
    recompute_s: float = 0.0  # of it, making caches anew


class Engine(Protocol):
    """Answers requests under weights `version` (-1: as opened, none of a run's). Only one that was opened with a teacher takes
    requests whose behaviour needs one."""

    version: int

    @property
    def inflight(self) -> int:
        """Requests admitted and not yet answered."""

    @property
    def inflight_tokens(self) -> int:
        """What the requests under way may come to, prompts included."""

    @property
    def free(self) -> int:
        """Requests that may be admitted now."""

    def admit(self, requests: Sequence[Request]) -> None:
        """Take requests, at most `free`. One that cannot be served is answered with an error at the next step."""

    def step(self) -> list[Answer]:
        """One token for everything in flight; what finished. Nothing in flight: an empty list at once."""

    def prepare(self, manifest: Weights, weights_dir: Path) -> None:
        """Read and verify weights `manifest`, in another thread while answers go on; SwapRefused when they cannot be had."""

    def swap_in(self, manifest: Weights, weights_dir: Path) -> Swapped:
        """Serve weights `manifest` from the next token on; SwapRefused leaves the old ones in place."""

    def probe(self, ids: list[int]) -> NDArray[np.float32]:
        """Log-probs at temperature 1 of ids[1:] given what precedes each, [len(ids) - 1], through the decode path."""

    def abort(self) -> list[Request]:
        """Drop everything in flight, and say what it was."""

    def sleep(self) -> None:
        """Give the device's memory back, with nothing in flight; an engine that has none to give does nothing."""

    def wake(self) -> None:
        """Take it again, before anything else is asked."""


def error_answer(request: Request, error: str, temperature: float, top_p: float, **partial: Any) -> Answer:
    """An answer that failed, with what had been written until then; it is counted and never trained."""
    nothing: dict[str, Any] = {
        "completion_ids": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32), "spans": [],
    }
    return Answer(
        request=request, finish=Finish.ERROR, temperature=temperature, top_p=top_p, error=error, **(nothing | partial)
    )
