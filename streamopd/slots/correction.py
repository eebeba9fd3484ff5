"""Off-policy correction of policy-gradient terms: r = p / mu, the learner against the kernel that sampled (core.md I8, I12).

A direct loss sums over every candidate, and takes none.
"""

from __future__ import annotations

from typing import ClassVar

from .slot import Slot


class NoCorrection(Slot, frozen=True):
    """1."""


class TruncatedRatio(Slot, frozen=True):
    """min(r, cap)."""

    cap: float = 2.0


class HardGate(Slot, frozen=True):
    """r where low ≤ r ≤ high, 0 outside."""

    low: float = 0.5
    high: float = 2.0


class ClippedRatio(Slot, frozen=True):
    """PPO's (arXiv 1707.06347): r, and 0 where the coefficient would carry r further out of [1 − low, 1 + high]."""

    low: float = 0.2
    high: float = 0.2


class SecondMomentBudget(Slot, frozen=True):
    """r, and 0 for the tokens of largest (log r)² until the mean of what is left is within `budget` (M2PO, arXiv 2510.01161)."""

    surveys: ClassVar = True
    budget: float = 0.04


class TeacherRatio(Slot, frozen=True):
    """(p/mu)^α (p/q)^(1−α) inside PPO's clip: the teacher as a trust region (RLAD, arXiv 2602.22495)."""

    facts: ClassVar = ("logq",)
    alpha: float = 0.5
    low: float = 0.2
    high: float = 0.2


Correction = NoCorrection | TruncatedRatio | HardGate | ClippedRatio | SecondMomentBudget | TeacherRatio
