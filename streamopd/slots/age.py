"""Age weight: a preference for fresh tokens."""

from __future__ import annotations

from .slot import Slot


class NoAgeWeight(Slot, frozen=True):
    """Every token counts the same, whatever wrote it."""


class AgeDecay(Slot, frozen=True):
    """weight ∝ 0.5^(age / half_life_steps), divided by its mean over the step's tokens: relative, mean one."""

    half_life_steps: float = 4.0


AgeWeight = NoAgeWeight | AgeDecay
