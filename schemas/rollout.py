"""Answers by the student, graded where they were written. A group is all answers to one prompt: the unit on the stream."""

from __future__ import annotations

from enum import Enum
from math import isfinite

from msgspec import Struct

from .array import Array, refuse_impossible
from .prompt import Prompt
from .topk import TopK

AUTHORS = ("student", "teacher", "gold")  # gold: the dataset


class Finish(Enum):
    """Why a rollout ended."""

    STOP = "stop"        # the student wrote a stop id
    LENGTH = "length"    # cut at max_completion_length
    ERROR = "error"      # the generation failed; counted, never trained
    ABORTED = "aborted"  # the generator was asked to stop


class Span(Struct, array_like=True, frozen=True):
    """Tokens [start, next span's start) were sampled under weights `version`."""

    start: int
    version: int
    kv: str = "keep"  # keep: they attended to keys and values of older weights | recompute: the cache was made anew


class Author(Struct, array_like=True, frozen=True):
    """Tokens [start, next author's start) were written by `who`."""

    start: int
    who: str  # one of AUTHORS

    def __post_init__(self) -> None:
        if self.who not in AUTHORS:
            raise ValueError(f"tokens from {self.start} on were written by {self.who!r}; authors are {', '.join(AUTHORS)}")


class Outcome(Struct, array_like=True, omit_defaults=True, frozen=True):
    """A grader's verdict."""

    reward: float
    correct: bool | None = None
    feedback: str = ""

    def __post_init__(self) -> None:
        if not isfinite(self.reward):
            raise ValueError(f"a reward is a number; this one is {self.reward}")


class Rollout(Struct, array_like=True, omit_defaults=True, frozen=True, kw_only=True):
    """One answer by the student. Arrays have length G (generated tokens) and speak of predicting token g."""

    id: str                              # "<prompt id>.<index in group>"
    prompt_ids: Array                    # int32 [P]  as the student saw it
    completion_ids: Array                # int32 [G]  the stop id included when finish is STOP
    logprobs: Array                      # float32 [G]  of the kernel that sampled: temperature and top-p applied
    weight_spans: list[Span]             # who wrote which tokens; contiguous, covers [0, G)
    finish: Finish = Finish.STOP
    temperature: float = 1.0             # of the sampling kernel; 0 is greedy, whose logprobs are at temperature 1
    top_p: float = 1.0
    student_topk: TopK | None = None     # the student's own top-k at sampling time, only when the method asks
    outcome: Outcome | None = None       # None: nobody graded it, which is not a reward of 0
    error: str = ""                      # the text, when finish is ERROR
    authors: list[Author] = []           # who wrote which tokens, in order, from token 0; [] = the student all of them
    steps: list[int] = []                # tokens at which a step of the answer begins, the first 0; [] = it is one step

    def __post_init__(self) -> None:
        length = len(self.completion_ids)
        if len(self.logprobs) != length:
            raise ValueError(f"rollout {self.id} has {length} completion ids but {len(self.logprobs)} logprobs")
        refuse_impossible(self.logprobs, f"rollout {self.id}: logprobs")
        if self.student_topk is not None and len(self.student_topk.logprobs) != length:
            raise ValueError(f"rollout {self.id} has {length} completion ids but {len(self.student_topk.logprobs)} top-k rows")
        if length and (not self.weight_spans or self.weight_spans[0].start != 0):
            raise ValueError(f"rollout {self.id}: its weight spans do not begin at token 0")
        starts = [span.start for span in self.weight_spans]
        versions = [span.version for span in self.weight_spans]
        if starts != sorted(set(starts)) or versions != sorted(versions) or (starts and starts[-1] >= max(length, 1)):
            raise ValueError(f"rollout {self.id}: weight spans {starts} @ {versions} do not cover {length} tokens in order")
        _refuse_unordered([author.start for author in self.authors], length, f"rollout {self.id}: authors")
        _refuse_unordered(self.steps, length, f"rollout {self.id}: steps")


class Group(Struct, array_like=True, omit_defaults=True, frozen=True, kw_only=True):
    """All answers to one prompt, whole by construction."""

    id: str
    run: str
    method: str
    born_s: float
    prompt: Prompt
    rollouts: list[Rollout]


def _refuse_unordered(starts: list[int], length: int, what: str) -> None:
    """Spans begin at token 0, each after the one before, and none beyond the last token."""
    if starts and (starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= max(length, 1)):
        raise ValueError(f"{what} begin at {starts}, which do not cover {length} tokens in order")
