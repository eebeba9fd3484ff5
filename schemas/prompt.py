"""A question on its way to a generator."""

from __future__ import annotations

from msgspec import Struct

from .array import Array


class Turn(Struct, frozen=True, forbid_unknown_fields=True):
    """One chat message, as text."""

    role: str
    content: str


class Prompt(Struct, array_like=True, omit_defaults=True, frozen=True, kw_only=True):
    """One question, rendered to ids once. `seq` -> (pass, index) -> prompt is a pure function of (seed, dataset)."""

    id: str                             # "p<seq>"
    run: str                            # run id; a record of another run is refused
    method: str                         # digest of the method; mixed digests are refused
    born_s: float                       # wall clock, seconds since the epoch
    seq: int                            # dense integer, from 0
    prompt_ids: Array                   # int32 [P]  what the student sees
    text: str = ""                      # the question, for people and for graders
    solution: str | None = None         # what a grader compares with; None: nothing to verify
    teacher_id: str = "default"         # who scores the answer
    teacher_prompt_ids: Array | None = None  # int32 [Q]  the teacher's own context; None: the same as the student's
    meta: dict[str, str] = {}           # of the dataset, untouched (a grader may read it)
    gold_ids: Array | None = None       # int32 [G]  the dataset's own answer, a stop id at its end; None: the method asks for none
