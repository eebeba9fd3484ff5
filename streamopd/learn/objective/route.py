"""Which tokens a branch speaks to: a predicate's answer for each, [T] bool."""

from __future__ import annotations

import torch
from torch import Tensor

from streamopd.schemas import AUTHORS
from streamopd.slots import (
    Always,
    Correct,
    Early,
    HighEntropy,
    Horizon,
    Incorrect,
    TeacherEntropy,
    TeacherPrefers,
    Trusted,
    When,
    WrittenBy,
)

from .facts import Facts, Known
from .quantile import quantile, reaches


def holds(when: When, facts: Facts, known: Known) -> Tensor:
    """Whether the predicate holds."""
    if isinstance(when, Always):
        return torch.ones_like(known.ids, dtype=torch.bool)
    if isinstance(when, TeacherEntropy):
        return facts["teacher_entropy"] > when.above
    if isinstance(when, TeacherPrefers):
        return facts["logq"].exp() - facts["logp"].exp() > when.margin
    if isinstance(when, Trusted):
        return known.uniform < (facts["logq"] - facts["logp"]).exp().clamp(max=1)
    if isinstance(when, Correct):
        return known.correct == 1
    if isinstance(when, Incorrect):
        return known.correct == 0
    if isinstance(when, WrittenBy):
        return known.author == AUTHORS.index(when.author)
    if isinstance(when, Horizon):
        return known.position < when.tokens  # type: ignore[operator]  # settled: a plain number
    if isinstance(when, HighEntropy):
        return reaches(facts["entropy"], quantile(facts["entropy"], when.quantile))
    assert isinstance(when, Early)
    return _early(facts["entropy"], known.row, when.share)


def _early(entropy_T: Tensor, row_T: Tensor, share: float) -> Tensor:
    """Tokens before which less than `share` of their answer's summed entropy lies."""
    early = torch.zeros_like(row_T, dtype=torch.bool)
    for row in row_T.unique():
        where = (row_T == row).nonzero()[:, 0]
        before = entropy_T[where].cumsum(0) - entropy_T[where]
        early[where] = before < share * entropy_T[where].sum()
    return early
