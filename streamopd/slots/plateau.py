"""Plateau: a stage of a method that has nothing more to give ends before its time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from .slot import Slot


class Plateau(Slot, frozen=True):
    """The mean of a figure over the stage's last `window` steps differs by at most the share `change` from that over the
    `window` before. A step without the figure is not counted, and an accuracy of 0 is no plateau: nothing is learned yet."""

    figure: Literal["loss", "overlap_ratio", "entropy", "accuracy"] = "loss"
    window: int = 20
    change: float = 0.01

    def __post_init__(self) -> None:
        if self.window < 1 or self.change <= 0:
            raise ValueError(f"A plateau has a window of at least 1 step and a change above 0; this one is {self}.")

    def reached(self, values: Sequence[float]) -> bool:
        """Whether the last 2 · `window` of the figure's values, oldest first, have stopped to move; of fewer nobody can say."""
        if len(values) < 2 * self.window:
            return False
        before, recent = fmean(values[-2 * self.window : -self.window]), fmean(values[-self.window :])
        return abs(recent - before) <= self.change * abs(before) and (self.figure != "accuracy" or recent > 0)
