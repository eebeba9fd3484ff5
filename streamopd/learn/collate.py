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
from streamopd.schemas import Array

from .objective import Target
from .rows import Row


class MicroBatch(NamedTuple):
    """Rows side by side, right-padded."""

    ids: Tensor              # int64 [R, L]
    where: Tensor            # int64 [M]  flat positions in [R · L] that predict the tokens that count
    target: Target           # of M tokens
    weights: Tensor          # float32 [M]  relative, mean one over the step
    temperature: Tensor      # float32 [M]  of the sampling kernel, 1 for greedy


def collate(rows: Sequence[Row], indices: NDArray[np.intp], weights: Sequence[NDArray[np.float32]], pad_id: int) -> MicroBatch:
    """The micro-batch of `rows[indices]`; `weights[i]` are those of row i's fresh tokens."""
    chosen = [rows[i] for i in indices]
    ids_RL = pad_right([np.concatenate([row.prompt, row.completion[:-1]]) for row in chosen], pad_id)
    where = predicting_positions([len(row.prompt) for row in chosen], [len(row.completion) for row in chosen], ids_RL.shape[1])
    fresh = np.concatenate([row.fresh for row in chosen])
    counts = [int(row.fresh.sum()) for row in chosen]
    kernels = np.array([row.rollout.temperature or 1.0 for row in chosen], np.float32)
    return MicroBatch(
        ids=torch.from_numpy(ids_RL),
        where=torch.from_numpy(where[fresh]),
        target=_target(chosen, fresh),
        weights=torch.from_numpy(np.concatenate([weights[i] for i in indices])),
        temperature=torch.from_numpy(np.repeat(kernels, counts)),
    )


def _target(rows: Sequence[Row], fresh: NDArray[np.bool_]) -> Target:
    sampled = np.concatenate([row.completion for row in rows])[fresh]
    supports = [row.view.support for row in rows]
    if any(support is None for support in supports):
        raise GarbageRecord(f"The evidence on rollout {rows[supports.index(None)].rollout.id} has no support to learn from.")
    logp = [support.logprobs.numpy() for support in supports if support is not None]
    ids = [support.ids.numpy() for support in supports if support is not None and support.ids is not None]
    return Target(
        sampled=torch.from_numpy(sampled.astype(np.int64)),
        support=torch.from_numpy(_stack(logp, -np.inf)[fresh]).float(),
        ids=torch.from_numpy(_stack(ids, -1)[fresh]).long() if ids else None,
        mass=_column([row.view.mass for row in rows], fresh),
        stop_logmass=_column([row.view.stop_logmass for row in rows], fresh),
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
    """[M], or None when a view lacks it."""
    present = [array.numpy() for array in arrays if array is not None]
    return torch.from_numpy(np.concatenate(present)[fresh]) if len(present) == len(arrays) else None
