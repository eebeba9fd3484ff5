"""From rows to the tensors of one micro-batch. M: the tokens that count, rows one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamopd.errors import GarbageRecord
from streamopd.layout import pad_right, predicting_positions
from streamopd.schemas import Array, Evidence

from .objective import Target
from .rows import Row


class MicroBatch(NamedTuple):
    """Rows side by side, right-padded."""

    ids: Tensor                 # int64 [R, L]
    where: Tensor               # int64 [M]  flat positions in [R · L] that predict the tokens that count
    at: Tensor                  # int64 [M]  where those tokens stand among all of the step
    teachers: list[Evidences]   # one a teacher that is asked; the routed ones of all rows together are one
    reference: Evidences | None


class Evidences(NamedTuple):
    """What one teacher, or the one that each row was routed to, says of M tokens."""

    target: Target
    hidden: Tensor | None       # float16 [M, d]  instead of a support
    teacher: list[str]          # whose, by row
    rows: Tensor                # int64 [M]  which of those


OPTIONAL = ("mass", "stop_logmass", "entropy", "hidden")  # columns that not every teacher gives


def told_by_all(rows: Sequence[Row]) -> frozenset[str]:
    """The optional columns that every view of a step has: what one lacks is used of none, however the step is cut."""
    views = [view for row in rows for view in row.views]
    return frozenset(name for name in OPTIONAL if all(getattr(view, name) is not None for view in views))


def collate(rows: Sequence[Row], indices: NDArray[np.intp], pad_id: int, told: frozenset[str]) -> MicroBatch:
    """The micro-batch of `rows[indices]`, with the optional columns of the step that are `told` by all."""
    chosen = [rows[i] for i in indices]
    ids_RL = pad_right([np.concatenate([row.prompt, row.completion[:-1]]) for row in chosen], pad_id)
    where = predicting_positions([len(row.prompt) for row in chosen], [len(row.completion) for row in chosen], ids_RL.shape[1])
    fresh = np.concatenate([row.fresh for row in chosen])
    counts = [int(row.fresh.sum()) for row in rows]
    ends = np.cumsum(counts)
    return MicroBatch(
        ids=torch.from_numpy(ids_RL),
        where=torch.from_numpy(where[fresh]),
        at=torch.from_numpy(np.concatenate([np.arange(ends[i] - counts[i], ends[i]) for i in indices])),
        teachers=[_evidences(chosen, [row.teachers[j] for row in chosen], fresh, told) for j in range(_teachers(chosen))],
        reference=_reference(chosen, fresh, told),
    )


def _teachers(rows: Sequence[Row]) -> int:
    """How many speak of every row."""
    counts = {len(row.teachers) for row in rows}
    if len(counts) > 1:
        raise GarbageRecord(f"Answers of one step have {sorted(counts)} teachers' views; each needs the same number.")
    return counts.pop()


def _reference(rows: Sequence[Row], fresh: NDArray[np.bool_], told: frozenset[str]) -> Evidences | None:
    views = [row.reference for row in rows]
    present = [view for view in views if view is not None]
    return _evidences(rows, present, fresh, told) if len(present) == len(views) else None


def _evidences(rows: Sequence[Row], views: Sequence[Evidence], fresh: NDArray[np.bool_], told: frozenset[str]) -> Evidences:
    counts = [int(row.fresh.sum()) for row in rows]
    hidden = _column([view.hidden for view in views], fresh) if "hidden" in told else None
    return Evidences(
        target=_target(rows, views, fresh, told), hidden=hidden,
        teacher=[view.teacher_id for view in views], rows=torch.from_numpy(np.repeat(np.arange(len(rows)), counts)),
    )


def _target(rows: Sequence[Row], views: Sequence[Evidence], fresh: NDArray[np.bool_], told: frozenset[str]) -> Target:
    sampled = np.concatenate([row.completion for row in rows])[fresh]
    supports = [view.support for view in views]
    if any(support is None for support in supports) and "hidden" not in told:
        raise GarbageRecord(f"The evidence on rollout {views[supports.index(None)].rollout_id} has no support to learn from.")
    logp = [support.logprobs.numpy() for support in supports if support is not None]
    ids = [support.ids.numpy() for support in supports if support is not None and support.ids is not None]
    return Target(
        sampled=torch.from_numpy(sampled.astype(np.int64)),
        support=torch.from_numpy(_stack(logp, -np.inf)[fresh]).float() if logp else torch.zeros(len(sampled), 0),
        ids=torch.from_numpy(_stack(ids, -1)[fresh]).long() if ids else None,
        logp=_column([view.logprobs for view in views], fresh),
        **{name: _column([getattr(view, name) for view in views], fresh) for name in ("mass", "stop_logmass", "entropy") if name in told},
    )


def _stack(parts: Sequence[NDArray[np.generic]], fill: float) -> NDArray[np.generic]:
    """[ΣG, K] rows one after another, narrower ones filled up."""
    widths = {part.shape[1] for part in parts}
    if len(widths) == 1:
        return np.concatenate(parts)
    lengths = [len(part) for part in parts]
    stacked = np.full((sum(lengths), max(widths)), fill, parts[0].dtype)
    for part, end in zip(parts, np.cumsum(lengths), strict=True):
        stacked[end - len(part) : end, : part.shape[1]] = part
    return stacked


def _column(arrays: Sequence[Array | None], fresh: NDArray[np.bool_]) -> Tensor | None:
    """[M] or [M, d], or None when a view lacks it."""
    present = [array.numpy() for array in arrays if array is not None]
    return torch.from_numpy(np.concatenate(present)[fresh]) if len(present) == len(arrays) else None
