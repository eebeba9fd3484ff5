"""Select: which answers of a graded group go on, before anything is learned from them. Statistics of the group (pass rate,
advantages) are taken after it. An answer that does not go on is counted as `selected_out`."""

from __future__ import annotations

from .slot import Slot


class Everything(Slot, frozen=True):
    """All of them."""


class PassBetween(Slot, frozen=True):
    """Groups whose share of correct answers lies in [low, high]; others go whole."""

    low: float = 0.0
    high: float = 1.0


class DropEqual(Slot, frozen=True):
    """Groups whose rewards differ; where all are equal there is nothing to compare."""


class Balance(Slot, frozen=True):
    """As many correct answers as wrong ones, the first of each kind; a group of one kind stays as it is (arXiv 2605.03677)."""


class BestOf(Slot, frozen=True):
    """The `count` answers of highest reward; the first among equals."""

    count: int = 1


class RankPair(Slot, frozen=True):
    """The best and the worst answer; a group of equals goes whole."""


Select = Everything | PassBetween | DropEqual | Balance | BestOf | RankPair
