"""A quantile of the tokens of a step, however many they are."""

from __future__ import annotations

from math import floor

from torch import Tensor

TIE = 1e-5  # of the border: answers to one prompt begin alike, and their last bits depend on how a step is cut


def quantile(values_T: Tensor, fraction: float) -> Tensor:
    """Between the two nearest ranks, linearly, as `torch.quantile`, which refuses more than 2^24 values; T >= 1."""
    ranked_T, rank = values_T.sort().values, fraction * (len(values_T) - 1)
    below = floor(rank)
    return ranked_T[below].lerp(ranked_T[min(below + 1, len(values_T) - 1)], rank - below)


def reaches(values_T: Tensor, border: Tensor) -> Tensor:
    """Which of [T] are at least `border`, those that only rounding parts from it among them."""
    return values_T >= border - TIE * border.abs()
