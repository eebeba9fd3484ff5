"""What becomes of policy-gradient coefficients. [T] each; those that look at more than their own token need the whole step."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from streamopd.slots import (
    Baseline,
    Clip,
    DropBeyond,
    Floor,
    MarginShift,
    Modulate,
    OffPolicyShape,
    OutcomeGate,
    Return,
    Shape,
    Sign,
    SoftLog,
)

from .facts import Facts, Known


def bend(a_T: Tensor, shape: Shape, facts: Facts, known: Known) -> Tensor:
    """The coefficients after one shape."""
    if isinstance(shape, Clip):
        return a_T.clamp(-shape.limit, shape.limit)
    if isinstance(shape, DropBeyond):
        return a_T.masked_fill(a_T.abs() >= shape.limit, 0)
    if isinstance(shape, Floor):
        return a_T.clamp(min=skewed_floor(shape.skew))
    if isinstance(shape, SoftLog):
        return a_T.sign() * a_T.abs().log1p()
    if isinstance(shape, Sign):
        apart = (0.5 * (facts["logq"] - facts["logp"]).clamp(max=2.0).expm1().abs()).clamp(max=1)
        return a_T.sign() * apart.mean()
    if isinstance(shape, Baseline):
        return a_T + facts["baseline"]
    if isinstance(shape, OutcomeGate):
        gained, lost = a_T.clamp(min=0), a_T.clamp(max=0)
        return torch.where(known.correct == 1, gained, torch.where(known.correct == 0, lost, torch.zeros_like(a_T)))
    if isinstance(shape, MarginShift):
        return a_T + margin_shift(a_T, known, shape.margin)
    if isinstance(shape, Return):
        return returns(a_T, known.row, shape)
    if isinstance(shape, OffPolicyShape):
        p_T = facts["logp"].exp()
        return a_T * shape.gamma * p_T / (p_T + shape.gamma) ** 2
    assert isinstance(shape, Modulate)
    gain_T = (facts["logq"] - facts["logp"] - shape.threshold).clamp(min=0)
    return a_T * (1 + torch.where(a_T > 0, shape.positive, shape.negative) * gain_T)  # type: ignore[arg-type]


def skewed_floor(skew: float) -> float:
    """log(λ) / (1 − λ): where the skewed log-ratio log(λ + (1−λ) u) / (1−λ) ends as u goes to 0. Not log(λ / (1 − λ))."""
    return log(skew) / (1 - skew)


def returns(a_T: Tensor, row_T: Tensor, shape: Return) -> Tensor:
    """Σ_i γ^i a_{t+i} within an answer, all answers in step from their ends. Rows are contiguous and in order."""
    rows, counts = row_T.unique_consecutive(return_counts=True)
    if not len(rows):
        return a_T
    longest = int(counts.max())
    from_end_T = counts.repeat_interleave(counts) - 1 - _place_in_row(counts)
    row_of_T = torch.arange(len(rows), device=a_T.device).repeat_interleave(counts)
    a_GR = torch.zeros(longest, len(rows), dtype=a_T.dtype, device=a_T.device)
    a_GR[from_end_T, row_of_T] = a_T
    found_GR, total_R, weight = torch.zeros_like(a_GR), torch.zeros_like(a_GR[0]), 0.0
    for g in range(longest):  # g tokens follow
        ahead_R, ahead_weight = total_R * shape.gamma, weight * shape.gamma
        total_R, weight = a_GR[g] + ahead_R, 1 + ahead_weight
        value_R, norm = (ahead_R, ahead_weight) if shape.future else (total_R, weight)
        found_GR[g] = value_R / norm if shape.normalised and norm else value_R
    return found_GR[from_end_T, row_of_T]


def _place_in_row(counts_R: Tensor) -> Tensor:
    """[T] 0, 1, 2 … in each row."""
    starts = counts_R.cumsum(0) - counts_R
    return torch.arange(int(counts_R.sum()), device=counts_R.device) - starts.repeat_interleave(counts_R)


def margin_shift(a_T: Tensor, known: Known, margin: float) -> Tensor:
    """Half of what is missing to `margin` up on a group's correct answers, half down on its wrong ones."""
    shift = torch.zeros_like(a_T)
    for group in known.group.unique():
        right, wrong = ((known.group == group) & (known.correct == verdict) for verdict in (1, 0))
        if not bool(right.any()) or not bool(wrong.any()):
            continue
        gap = _mean_of_answers(a_T, known.row, right) - _mean_of_answers(a_T, known.row, wrong)
        half = max(0.0, margin - gap) / 2
        shift[right], shift[wrong] = half, -half
    return shift


def _mean_of_answers(a_T: Tensor, row_T: Tensor, mask_T: Tensor) -> float:
    """The mean over answers of their mean coefficients."""
    rows = row_T[mask_T].unique()
    return float(torch.stack([a_T[mask_T & (row_T == row)].mean() for row in rows]).mean())
