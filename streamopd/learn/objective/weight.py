"""How much a token counts in its branch, [T] ≥ 0. `active` are the tokens that the branch speaks to at all."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from streamopd.slots import (
    AtLeastFloor,
    ChangePoint,
    EntropyOrDivergence,
    EntropyScore,
    GroupSoftmax,
    Keep,
    LogRatio,
    Normaliser,
    PassRate,
    RelativeConfidence,
    RockTokens,
    Score,
    StepRatio,
    Teachability,
    TeacherAccepts,
    Weight,
)

from .facts import Facts, Known
from .quantile import quantile, reaches
from .shape import skewed_floor


def weigh(weight: Weight, facts: Facts, known: Known, active: Tensor) -> Tensor:
    """What one weight gives."""
    if isinstance(weight, Keep):
        return _normalised(keep(score(weight.score, facts, active), known.row, active, weight), active, weight.normaliser)
    if isinstance(weight, AtLeastFloor):
        above = (facts["logq"] - facts["logp"] >= skewed_floor(weight.skew)).float()
        return _normalised(above, active, weight.normaliser)
    if isinstance(weight, TeacherAccepts):
        return torch.where(facts["rank"] < weight.k, 1.0, weight.otherwise)
    if isinstance(weight, RelativeConfidence):
        return torch.sigmoid(facts["entropy"] - facts["teacher_entropy"])
    if isinstance(weight, StepRatio):
        return step_ratio((facts["logq"] - facts["logp"]).abs(), known, weight)
    if isinstance(weight, ChangePoint):
        return change_points(facts["margin"], known.row, active, weight)
    if isinstance(weight, RockTokens):
        return rock_tokens(facts["divergence"] * active, known.ids, weight)
    if isinstance(weight, PassRate):
        return (known.pass_rate**weight.a * (1 - known.pass_rate) ** weight.b).nan_to_num(0)
    assert isinstance(weight, GroupSoftmax)
    told = -facts["logp"] if weight.of == "student_surprise" else facts["logq"]
    return group_softmax(told / weight.temperature, known, active)


# ---------------------------------------------------------------- keeping a share
def score(scored: Score, facts: Facts, active: Tensor) -> Tensor:
    """What `Keep` ranks tokens by; scales are those of the active ones."""
    if isinstance(scored, EntropyScore):
        return facts["entropy"]
    if isinstance(scored, LogRatio):
        return facts["logq"] - facts["logp"]
    if isinstance(scored, EntropyOrDivergence):
        h, d = _unit(facts["entropy"], active), _unit(facts["divergence"], active)
        return h + d - h * d
    assert isinstance(scored, Teachability)
    return _robust(facts["divergence"], active) * _robust(facts["agreement"], active)


def keep(score_T: Tensor, row_T: Tensor, active: Tensor, weight: Keep) -> Tensor:
    """1 for the best share of the population's active tokens, and for those that are equal to the last of them."""
    kept = torch.zeros_like(score_T)
    populations = [active] if weight.over == "step" else [active & (row_T == row) for row in row_T.unique()]
    for population in populations:
        if bool(population.any()):
            count = max(1, round(float(weight.fraction) * int(population.sum())))  # type: ignore[arg-type]
            least = score_T[population].topk(count).values[-1]
            kept[population & reaches(score_T, least)] = 1
    return kept


def _unit(values_T: Tensor, active: Tensor) -> Tensor:
    """Scaled to [0, 1] by the extremes."""
    among = values_T[active]
    low, high = (among.min(), among.max()) if len(among) else (0.0, 0.0)
    return ((values_T - low) / (high - low)).clamp(0, 1) if high > low else torch.zeros_like(values_T)


def _robust(values_T: Tensor, active: Tensor) -> Tensor:
    """Scaled to [0, 1] by the 5 % and 95 % quantiles; all equal counts fully."""
    among = values_T[active]
    low, high = (quantile(among, 0.05), quantile(among, 0.95)) if len(among) else (0.0, 0.0)
    return ((values_T - low) / (high - low)).clamp(0, 1) if high > low else torch.ones_like(values_T)


def _normalised(weight_T: Tensor, active: Tensor, normaliser: Normaliser) -> Tensor:
    """Mean one over the active tokens, unless all are 0."""
    total = float(weight_T[active].sum())
    return weight_T * (int(active.sum()) / total) if normaliser == "mean_one" and total > 0 else weight_T


# ---------------------------------------------------------------- within an answer
def step_ratio(apart_T: Tensor, known: Known, weight: StepRatio) -> Tensor:
    """min(d_1 / d_k, 1 + δ) in step k: the product of neighbouring ratios telescopes to it."""
    if not len(apart_T):
        return apart_T
    width = int(known.segment.max()) + 1
    steps, step_of_T = (known.row * width + known.segment).unique(return_inverse=True)  # ascending: an answer's first step comes first
    sums = torch.zeros(len(steps), dtype=apart_T.dtype, device=apart_T.device).index_add_(0, step_of_T, apart_T)
    means = sums / step_of_T.bincount(minlength=len(steps)) + weight.epsilon
    row_of_S = steps // width
    first_of_S = torch.searchsorted(row_of_S, row_of_S)
    ratio = (means[first_of_S] / means).clamp(max=1 + weight.delta)
    ratio[first_of_S == torch.arange(len(steps), device=steps.device)] = 1
    return ratio[step_of_T]


def change_points(margin_T: Tensor, row_T: Tensor, active: Tensor, weight: ChangePoint) -> Tensor:
    """1 before the answer's change point, 0 after, and what is kept has the mass of all."""
    weights = torch.zeros_like(margin_T)
    for row in row_T.unique():
        where = (row_T == row).nonzero()[:, 0]
        segments = margin_T[where].split(weight.segment)
        at = downward_change(torch.stack([segment.mean() for segment in segments]), weight.effect)
        weights[where[: len(where) if at is None else at * weight.segment]] = 1
    return _normalised(weights, active, "mean_one")


def downward_change(series_S: Tensor, effect: float) -> int | None:
    """Where the mean of a series drops for good: at least 3 on each side, `effect` standard deviations, and BIC says two means.

    The series is winsorised at 5 and 95 % and smoothed by a median of three first.
    """
    count = len(series_S)
    if count < 6:
        return None
    bounded = series_S.double().clamp(float(series_S.double().quantile(0.05)), float(series_S.double().quantile(0.95)))
    padded = torch.cat([bounded[:1], bounded, bounded[-1:]])
    smooth = padded.unfold(0, 3, 1).median(1).values
    spread = float(smooth.std(correction=0))
    if spread == 0:
        return None
    splits = {at: _rss(smooth[:at]) + _rss(smooth[at:]) for at in range(3, count - 2)}
    at = min(splits, key=splits.__getitem__)
    drop = float(smooth[:at].mean() - smooth[at:].mean())
    one, two = max(_rss(smooth), 1e-12), max(splits[at], 1e-12)
    better = count * log(two / count) + 3 * log(count) < count * log(one / count) + log(count)
    return at if drop >= effect * spread and better else None


def _rss(part: Tensor) -> float:
    return float(((part - part.mean()) ** 2).sum())


# ---------------------------------------------------------------- across answers
def rock_tokens(divergence_T: Tensor, ids_T: Tensor, weight: RockTokens) -> Tensor:
    """0 for the ids of the step that hold out most: mean divergence times count, which is their sum."""
    weights = torch.ones_like(divergence_T)
    if not weight.active:
        return weights
    ids, inverse = ids_T.unique(return_inverse=True)
    held = torch.zeros(len(ids), dtype=divergence_T.dtype, device=divergence_T.device).index_add_(0, inverse, divergence_T)
    rocks = int(weight.fraction * len(ids))
    if rocks:
        weights[torch.isin(inverse, held.topk(rocks).indices)] = 0
    return weights


def group_softmax(told_T: Tensor, known: Known, active: Tensor) -> Tensor:
    """n softmax(mean told) among a group's answers that are active; every token of an answer gets its answer's."""
    weights = torch.ones_like(told_T)
    for group in known.group[active].unique():
        rows = known.row[active & (known.group == group)].unique()
        means = torch.stack([told_T[active & (known.row == row)].mean() for row in rows])
        for row, share in zip(rows, len(rows) * means.softmax(0), strict=True):
            weights[active & (known.row == row)] = share
    return weights
