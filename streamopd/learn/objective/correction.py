"""What a policy-gradient coefficient is multiplied by because another kernel sampled the token: r = p / mu, [T].

Only tokens of the student's own are corrected: what a teacher or the dataset wrote is worth what its branch says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamopd.slots import ClippedRatio, Correction, HardGate, NoCorrection, SecondMomentBudget, TeacherRatio, TruncatedRatio

from .divergence import MOST_LOG_RATIO
from .facts import Facts, Known


def correct(a_T: Tensor, correction: Correction, facts: Facts, known: Known) -> Tensor:
    """The coefficients, corrected."""
    if isinstance(correction, NoCorrection):
        return a_T
    own = known.author == 0
    return torch.where(own, a_T * factor(a_T, correction, facts, own), a_T)


def factor(a_T: Tensor, correction: Correction, facts: Facts, own: Tensor) -> Tensor:
    """[T] ≥ 0."""
    log_r_T = facts["log_ratio"].clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
    r_T = log_r_T.exp()
    if isinstance(correction, TruncatedRatio):
        return r_T.clamp(max=correction.cap)
    if isinstance(correction, HardGate):
        return torch.where((r_T >= correction.low) & (r_T <= correction.high), r_T, 0.0)
    if isinstance(correction, ClippedRatio):
        return _clipped(r_T, a_T, correction.low, correction.high)
    if isinstance(correction, TeacherRatio):
        to_teacher_T = (facts["logp"] - facts["logq"]).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
        mixed_T = (correction.alpha * log_r_T + (1 - correction.alpha) * to_teacher_T).exp()
        return _clipped(mixed_T, a_T, correction.low, correction.high)
    assert isinstance(correction, SecondMomentBudget)
    return r_T * within_budget(log_r_T, own, correction.budget)


def _clipped(r_T: Tensor, a_T: Tensor, low: float, high: float) -> Tensor:
    """The gradient of min(r a, clip(r) a) is r a, or 0 where the clip holds."""
    held = ((a_T > 0) & (r_T > 1 + high)) | ((a_T < 0) & (r_T < 1 - low))
    return r_T.masked_fill(held, 0)


def within_budget(log_r_T: Tensor, own: Tensor, budget: float) -> Tensor:
    """1 for the `own` tokens that stay when the largest (log r)² go until the mean of the rest is within the budget."""
    kept, mine = torch.ones_like(log_r_T), own.nonzero()[:, 0]
    order = mine[(log_r_T[mine] ** 2).argsort()]
    means = (log_r_T[order] ** 2).double().cumsum(0) / torch.arange(1, len(order) + 1, device=order.device)
    kept[order[means > budget]] = 0
    return kept
