"""When: which tokens a branch speaks to. A setting is a question about one token."""

from __future__ import annotations

from typing import ClassVar, Literal

from .slot import Scalar, Slot


class Always(Slot, frozen=True):
    """Every token."""


class TeacherEntropy(Slot, frozen=True):
    """H(q) is above so many nats (arXiv 2603.07079)."""

    facts: ClassVar = ("teacher_entropy",)
    above: float = 0.8


class TeacherPrefers(Slot, frozen=True):
    """q − p of the written token is above `margin` (arXiv 2605.06387)."""

    facts: ClassVar = ("logq",)
    margin: float = 0.0


class Trusted(Slot, frozen=True):
    """A coin that falls so with probability min(q/p, 1) of the written token: speculative decoding's test (arXiv 2606.01249).
    The same token falls the same way at the same step, however the step is cut."""

    facts: ClassVar = ("logq",)


class Correct(Slot, frozen=True):
    """The grader found the answer right."""


class Incorrect(Slot, frozen=True):
    """The grader found the answer wrong."""


class WrittenBy(Slot, frozen=True):
    """Tokens that the student sampled, or that a teacher or ("gold") the dataset wrote."""

    author: Literal["student", "teacher", "gold"] = "student"


class HighEntropy(Slot, frozen=True):
    """H(p) is above this quantile of the step (arXiv 2603.13260)."""

    facts: ClassVar = ("entropy",)
    surveys: ClassVar = True
    quantile: float = 0.1


class Early(Slot, frozen=True):
    """Tokens of an answer until this share of its summed H(p) is reached (arXiv 2603.13260)."""

    facts: ClassVar = ("entropy",)
    surveys: ClassVar = True
    share: float = 0.1


class Horizon(Slot, frozen=True):
    """The first so many tokens of an answer (arXiv 2602.15260)."""

    tokens: Scalar = 100.0


When = (
    Always | TeacherEntropy | TeacherPrefers | Trusted | Correct | Incorrect | WrittenBy | HighEntropy | Early | Horizon
)
