"""Shape: what becomes of a policy-gradient coefficient, in order. D = log q − log p of the written token."""

from __future__ import annotations

from typing import ClassVar

from .slot import Scalar, Slot


def require_skew(skew: float) -> None:
    if not 0 < skew < 1:
        raise ValueError(f"A skew lies between 0 and 1, where log(λ) / (1 − λ) is a number; this one is {skew}.")


class Clip(Slot, frozen=True):
    """Into [−limit, limit]."""

    limit: float = 10.0


class DropBeyond(Slot, frozen=True):
    """0 where |coefficient| ≥ limit (arXiv 2605.03677)."""

    limit: float = 10.0


class Floor(Slot, frozen=True):
    """At least log(λ) / (1 − λ), the floor of the skewed log-ratio (REOPOLD, arXiv 2603.11137)."""

    skew: float = 0.2

    def __post_init__(self) -> None:
        require_skew(self.skew)


class SoftLog(Slot, frozen=True):
    """sign(a) log(1 + |a|)."""


class Sign(Slot, frozen=True):
    """sign(a) times the step's mean total variation ½|q/p − 1| capped at 1, estimated from its tokens (TV-OPD, arXiv 2609.08341)."""

    facts: ClassVar = ("logq",)
    surveys: ClassVar = True


class Baseline(Slot, frozen=True):
    """a + KL(p‖q), on the student's top k with both sides renormalised (vOPD, arXiv 2605.07865); k = 0: over all that the
    evidence carries. Its mean under p is 0, and the policy gradient stays what it was."""

    facts: ClassVar = ("baseline",)
    k: int = 100


class OutcomeGate(Slot, frozen=True):
    """max(a, 0) where the answer is correct, min(a, 0) where it is wrong (OPDVR, arXiv 2608.24696)."""


class MarginShift(Slot, frozen=True):
    """Mean coefficients of a group's correct and wrong answers are moved apart until `margin`, half by each (arXiv 2605.03677)."""

    surveys: ClassVar = True
    margin: float = 0.4


class Return(Slot, frozen=True):
    """Σ γ^i a_{t+i} over what follows, divided by Σ γ^i when `normalised`; without the token's own term when `future`
    (MiniLLM, arXiv 2306.08543)."""

    surveys: ClassVar = True
    gamma: float = 1.0
    normalised: bool = True
    future: bool = False


class OffPolicyShape(Slot, frozen=True):
    """a γ p / (p + γ)²: the gradient of p / (p + γ), for tokens that others wrote (LUFFY, arXiv 2504.14945)."""

    gamma: float = 0.1


class Modulate(Slot, frozen=True):
    """a (1 + c max(D − threshold, 0)), c `positive` where a > 0 and `negative` elsewhere (AMR-SD, arXiv 2605.18529)."""

    facts: ClassVar = ("logq",)
    positive: Scalar = 0.2
    negative: Scalar = 0.1
    threshold: float = 0.0


Shape = (
    Clip | DropBeyond | Floor | SoftLog | Sign | Baseline | OutcomeGate | MarginShift | Return | OffPolicyShape | Modulate
)
