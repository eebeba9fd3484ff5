"""Several teachers as one, over the cells that all of them speak of.

geometric   log g(c) = Σ_k w_k log q_k(c) − log Z: its reverse KL is the weighted sum of theirs, less log Z (core.md I7)
arithmetic  log g(c) = log Σ_k w_k q_k(c): its forward KL is
Cells are coarse-grained first and pooled then, so both hold for the bounds too. Shapes: K columns, J teachers, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .cells import LEAST_TAIL, NEVER, Target, merge

Kind = Literal["geometric", "arithmetic"]


def pooled(views: Sequence[Target], weights: Sequence[float], kind: Kind, stop_ids: Sequence[int]) -> Target:
    """One view of what the teachers think together; nobody knows its entropy."""
    if len(views) == 1:
        return views[0]
    shares = torch.tensor(weights, dtype=torch.float32, device=views[0].sampled.device)
    shares = shares / shares.sum()
    if any(view.ids is None for view in views):
        support = _mean(torch.stack([_one_stop(view.support, stop_ids) for view in views]), shares, kind).log_softmax(-1)
        return views[0]._replace(support=support, logp=None, entropy=None, stop_logmass=_stop_of(support, stop_ids))
    return _on_cells(views, shares, kind, stop_ids)


def _on_cells(views: Sequence[Target], shares: Tensor, kind: Kind, stop_ids: Sequence[int]) -> Target:
    first = views[0]
    assert first.ids is not None
    merged = len(stop_ids) > 1 and all(view.stop_logmass is not None for view in views)
    stops = torch.tensor(stop_ids if merged else [], dtype=torch.long, device=first.ids.device)
    told_JNK = torch.stack([_told_of(view, first.ids) for view in views])
    common_NK = (first.ids >= 0) & torch.isfinite(told_JNK).all(0) & ~torch.isin(first.ids, stops)
    cells_JNC = told_JNK.masked_fill(~common_NK, NEVER).clamp(min=NEVER)
    if merged:
        stop_JN1 = torch.stack([_required(view.stop_logmass) for view in views])[:, :, None].clamp(min=NEVER)
        cells_JNC = torch.cat([cells_JNC, stop_JN1], 2)
    common_ids = first.ids.masked_fill(~common_NK, -2)
    held_JN = torch.stack([_held(view, common_ids) for view in views])
    if merged:
        held_JN = held_JN + stop_JN1[:, :, 0].exp()
    tail_JN1 = (1 - held_JN).clamp(min=LEAST_TAIL).log()[:, :, None]
    together_NC = _mean(torch.cat([cells_JNC, tail_JN1], 2), shares, kind)
    scale_N1 = together_NC.logsumexp(1, keepdim=True)
    together_NC = together_NC - scale_N1
    width = first.ids.shape[1]
    support_NK = together_NC[:, :width].masked_fill(~common_NK, -torch.inf)
    written_JN = torch.stack([_required(view.logp) for view in views]).clamp(min=NEVER)
    return Target(
        sampled=first.sampled, support=support_NK, ids=first.ids.masked_fill(~common_NK, -1), mass=support_NK.exp().sum(1),
        stop_logmass=together_NC[:, width] if merged else first.stop_logmass,
        logp=_mean(written_JN, shares, kind) - scale_N1[:, 0],
    )


def _told_of(view: Target, ids_NK: Tensor) -> Tensor:
    """[N, K] the view's log-probs of somebody else's ids; -inf where it does not speak of them."""
    assert view.ids is not None
    same_NKL = (ids_NK[:, :, None] == view.ids[:, None, :]) & (view.ids >= 0)[:, None, :]
    return view.support[:, None, :].expand(same_NKL.shape).masked_fill(~same_NKL, -torch.inf).amax(2)


def _held(view: Target, common_NK: Tensor) -> Tensor:
    """[N] the view's mass on the common ids: the exact one of its support, less what is not common."""
    assert view.ids is not None
    common_NL = (view.ids[:, :, None] == common_NK[:, None, :]).any(2)
    probs_NL = view.support.exp()
    if view.mass is None:
        return probs_NL.masked_fill(~common_NL, 0).sum(1)
    return (view.mass - probs_NL.masked_fill(common_NL | (view.ids < 0), 0).sum(1)).clamp(min=0)


def _mean(logp_J: Tensor, shares_J: Tensor, kind: Kind) -> Tensor:
    by = shares_J.to(logp_J.dtype).reshape(-1, *[1] * (logp_J.ndim - 1))
    return (by * logp_J).sum(0) if kind == "geometric" else (logp_J + by.log()).logsumexp(0)


def _one_stop(support_NV: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """Log-masses [N, V] with all of stopping on the first of several stop ids: a cell is made before it is pooled."""
    merged_NV = support_NV.clamp(min=NEVER)
    merge(merged_NV, torch.tensor(stop_ids if len(stop_ids) > 1 else [], dtype=torch.long, device=merged_NV.device))
    return merged_NV


def _stop_of(support_NV: Tensor, stop_ids: Sequence[int]) -> Tensor | None:
    return support_NV[:, list(stop_ids)].logsumexp(1) if stop_ids else None


def _required(column: Tensor | None) -> Tensor:
    assert column is not None, "a pool needs every teacher's log-probs of the written token, and of stopping"
    return column
