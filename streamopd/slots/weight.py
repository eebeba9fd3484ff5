"""Weight: how much a token counts in its branch. Several are multiplied.

`normaliser`: "none" leaves them as they are; "mean_one" divides by their mean over the tokens that count at all, so that
dropping tokens does not shrink the step. `over` is the population that quantiles and means are taken in.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from .shape import require_skew
from .slot import Scalar, Slot

Normaliser = Literal["none", "mean_one"]
Population = Literal["step", "answer"]


# ---------------------------------------------------------------- scores, for Keep
class EntropyScore(Slot, frozen=True):
    """H(p)."""

    facts: ClassVar = ("entropy",)


class EntropyOrDivergence(Slot, frozen=True):
    """h + δ − h δ of normalised H(p) and KL(p‖q) (TIP, arXiv 2604.14084)."""

    facts: ClassVar = ("entropy", "divergence")


class Teachability(Slot, frozen=True):
    """Disagreement KL(p‖q) times q's mass on the student's top 16, both scaled by their 5 % and 95 % quantiles (TA-OPD,
    arXiv 2605.26844)."""

    facts: ClassVar = ("divergence", "agreement")


class LogRatio(Slot, frozen=True):
    """D = log q − log p of the written token."""

    facts: ClassVar = ("logq",)


Score = EntropyScore | EntropyOrDivergence | Teachability | LogRatio


# ---------------------------------------------------------------- weights of tokens
class Keep(Slot, frozen=True):
    """1 for the `fraction` with the highest score, 0 for the others; ties are kept."""

    surveys: ClassVar = True
    score: Score = EntropyScore()
    fraction: Scalar = 0.5
    over: Population = "step"
    normaliser: Normaliser = "mean_one"


class AtLeastFloor(Slot, frozen=True):
    """1 where D ≥ log(λ)/(1 − λ), 0 elsewhere: the exploring phase of REOPOLD (arXiv 2603.11137)."""

    facts: ClassVar = ("logq",)
    surveys: ClassVar = True
    skew: float = 0.2
    normaliser: Normaliser = "mean_one"

    def __post_init__(self) -> None:
        require_skew(self.skew)


class TeacherAccepts(Slot, frozen=True):
    """1 where the student's likeliest id is in the teacher's top k, `otherwise` elsewhere (SelecTKD, arXiv 2510.24021)."""

    facts: ClassVar = ("rank",)
    k: int = 5
    otherwise: float = 0.01


class RelativeConfidence(Slot, frozen=True):
    """σ(H(p) − H(q)) (TSD-KD, arXiv 2603.13260)."""

    facts: ClassVar = ("entropy", "teacher_entropy")


class StepRatio(Slot, frozen=True):
    """d_1 / d_k of an answer's k-th step, at most 1 + δ; d the mean |D| of a step, the first counts 1 (SOD, arXiv 2605.07725)."""

    facts: ClassVar = ("logq",)
    surveys: ClassVar = True
    epsilon: float = 1e-6
    delta: float = 0.2


class ChangePoint(Slot, frozen=True):
    """0 after the teacher has stopped to tell the student's candidates apart, and the mass of what is kept restored (arXiv
    2605.13643): one downward change of the margin (top minus mean of the teacher's log-probs over the student's top k),
    averaged over segments of `segment` tokens."""

    facts: ClassVar = ("margin",)
    surveys: ClassVar = True
    k: int = 16
    segment: int = 4
    effect: float = 0.5  # standard deviations


class RockTokens(Slot, frozen=True):
    """0 for ids whose mean KL(p‖q) times their count is among the highest `fraction` of the step's ids, while `active` is not 0
    (arXiv 2605.09253)."""

    facts: ClassVar = ("divergence",)
    surveys: ClassVar = True
    fraction: float = 0.18
    active: Scalar = 1.0


# ---------------------------------------------------------------- weights of whole answers
class PassRate(Slot, frozen=True):
    """x^a (1−x)^b of the group's share of correct answers x (PACED, arXiv 2603.11178)."""

    a: float = 1.0
    b: float = 1.0


class GroupSoftmax(Slot, frozen=True):
    """n softmax(score / τ) among the n answers of a group that the branch speaks to, score the mean of −log p or log q (SCOPE,
    arXiv 2604.10688). A lone answer weighs 1."""

    surveys: ClassVar = True
    of: Literal["student_surprise", "teacher_likelihood"] = "teacher_likelihood"
    temperature: float = 1.0

    @property
    def facts(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("logq",) if self.of == "teacher_likelihood" else ()


Weight = (
    Keep | AtLeastFloor | TeacherAccepts | RelativeConfidence | StepRatio | ChangePoint | RockTokens | PassRate | GroupSoftmax
)
