"""One partition on both sides: what a divergence is summed over.

Partition law (core.md I11): at each position both sides are coarse-grained by the same cells. A cell is one id, the stop
ids together (ending is one action, whichever id says it: arXiv 2609.20511), or the tail: everything else. What is padded or
cannot occur has log-mass `NEVER` on both sides and contributes nothing, in value and in gradient. So any fixed support gives
a lower bound of the exact divergence, and S = V, whose tail is empty, gives the divergence itself.

Shapes: N tokens of a chunk, V vocabulary, K support columns, C cells. p the student, q the teacher (never differentiated).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamopd.errors import UserError
from streamopd.slots import FullVocabulary, Intersection, Remainder, StudentTop, Support, TeacherTop, Union

NEVER = -1e4            # log-mass of a cell that cannot occur: finite, so that 0 · log 0 is 0 and gradients stay finite
HIDDEN = -1e30          # logit of an id that another cell accounts for
LEAST_TAIL = 2.0**-24   # a tail that exists is never smaller: the resolution of the float32 `mass` it is computed from


class Target(NamedTuple):
    """What a teacher says about N tokens, as evidence carries it."""

    sampled: Tensor                      # int64 [N]  the ids that were written
    support: Tensor                      # float32 [N, K], or [N, V] when `ids` is None; -inf pads
    ids: Tensor | None = None            # int64 [N, K]; -1 pads
    mass: Tensor | None = None           # float32 [N]  of the whole support, before its rounding to float16
    stop_logmass: Tensor | None = None   # float32 [N]  of all stop ids together
    logp: Tensor | None = None           # float32 [N]  log q(written id); None: looked up in the support
    entropy: Tensor | None = None        # float32 [N]  of the whole distribution


class Cells(NamedTuple):
    """Log-masses of N tokens over one partition."""

    p: Tensor           # [N, C]  with gradient
    q: Tensor           # [N, C]
    tail: bool = False  # whether the last cell is everything else


def partition(logits_NV: Tensor, target: Target, support: Support, stop_ids: Sequence[int]) -> Cells:
    """Both sides over the support's cells. UserError when the two vocabularies differ in size and the whole one is asked for."""
    if isinstance(support, FullVocabulary):
        return on_vocabulary(logits_NV, target, stop_ids)
    if isinstance(support, Union):
        return on_partition(logits_NV, target, support.remainder, stop_ids if support.stop else ())
    return on_partition(logits_NV, chosen(logits_NV, target, support, stop_ids), support.remainder, stop_ids)


def on_vocabulary(logits_NV: Tensor, target: Target, stop_ids: Sequence[int]) -> Cells:
    """One cell an id, the stop ids together."""
    if target.ids is not None or target.support.shape != logits_NV.shape:
        raise UserError(
            f"The teacher speaks of {target.support.shape[1]} ids, the student of {logits_NV.shape[1]}: a divergence over the "
            'whole vocabulary needs one vocabulary. Choose a method with a support of ids, like "forward_kl_topk".'
        )
    stops = torch.tensor(list(stop_ids) if len(stop_ids) > 1 else [], dtype=torch.long, device=logits_NV.device)
    q_NV = target.support.to(logits_NV.dtype).clamp(min=NEVER)
    merge(q_NV, stops)
    return Cells(WholeVocabulary.apply(logits_NV, stops), q_NV)  # type: ignore[no-untyped-call]


def merge(logp_NV: Tensor, stops: Tensor) -> Tensor:
    """In place: the stop ids' mass together at the first of them, the others at NEVER. [N, S]: each one's share of it."""
    if not len(stops):
        return logp_NV[:, :0]
    each_NS = logp_NV[:, stops]
    together_N1 = each_NS.logsumexp(1, keepdim=True)
    logp_NV[:, stops] = NEVER
    logp_NV[:, stops[:1]] = together_N1
    return (each_NS - together_N1).exp()


class WholeVocabulary(torch.autograd.Function):
    """Log-masses of all ids, stop ids merged: one array beside the logits, and for the gradient two."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, stops: Tensor) -> Tensor:
        p_NV = logits_NV.log_softmax(-1)
        shares_NS = merge(p_NV, stops)
        ctx.save_for_backward(p_NV, stops, shares_NS)
        return p_NV

    @staticmethod
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        p_NV, stops, shares_NS = ctx.saved_tensors
        through_NV = p_NV.exp().mul_(-grad_NV.sum(1, keepdim=True)).add_(grad_NV)
        if len(stops):
            through_NV[:, stops] = through_NV[:, stops[:1]] * shares_NS
        return through_NV, None


def on_partition(logits_NV: Tensor, target: Target, remainder: Remainder, stop_ids: Sequence[int]) -> Cells:
    """{support ids} ∪ {stop class} ∪ {tail}, by `remainder`."""
    target = _as_ids(target)
    assert target.ids is not None
    merges = len(stop_ids) > 1 and target.stop_logmass is not None
    stops = torch.tensor(list(stop_ids) if merges else [], dtype=torch.long, device=logits_NV.device)
    valid_NK = target.ids >= 0
    single_NK = valid_NK & ~torch.isin(target.ids, stops)  # cells of one id
    held_NH, rest_N, none_left_N = _parted(logits_NV, target.ids, stops)
    width = target.ids.shape[1]
    logit_NC = held_NH[:, :width].masked_fill(~single_NK, HIDDEN)
    q_NC = target.support.to(logits_NV.dtype).clamp(min=NEVER).masked_fill(~single_NK, NEVER)
    if len(stops):
        assert target.stop_logmass is not None
        logit_NC = torch.cat([logit_NC, held_NH[:, width:].logsumexp(1, keepdim=True)], 1)
        q_NC = torch.cat([q_NC, target.stop_logmass[:, None].to(q_NC.dtype).clamp(min=NEVER)], 1)
    if remainder == "renorm":
        return Cells(_bounded(logit_NC.log_softmax(-1)), q_NC.log_softmax(-1))
    p_NC = torch.cat([logit_NC, rest_N[:, None]], 1)
    p_NC = _bounded(p_NC - p_NC.logsumexp(1, keepdim=True))
    if remainder == "drop":
        return Cells(p_NC[:, :-1], q_NC)
    tail_N = _teacher_tail(target, q_NC, valid_NK, stops).masked_fill(none_left_N, NEVER)
    return Cells(p_NC, torch.cat([q_NC, tail_N[:, None]], 1).log_softmax(-1), tail=True)  # takes back what float16 rounded off


# ---------------------------------------------------------------- choosing ids of the evidence
@torch.no_grad()
def chosen(logits_NV: Tensor, target: Target, support: Support, stop_ids: Sequence[int]) -> Target:
    """The evidence cut down to the ids that the support names; the stop ids stay in every one."""
    target = _as_ids(target)
    assert target.ids is not None
    valid_NK = target.ids >= 0
    q_NK = target.support.masked_fill(~valid_NK, -torch.inf)
    p_NK = logits_NV.gather(1, target.ids.clamp(min=0)).masked_fill(~valid_NK, -torch.inf)
    if isinstance(support, TeacherTop):
        kept_NK = _best(q_NK, support.k)
    elif isinstance(support, StudentTop):
        kept_NK = _best(p_NK, support.k)
    elif isinstance(support, Intersection):
        kept_NK = _best(q_NK, support.k) & _best(p_NK, support.k)
    else:
        assert not isinstance(support, FullVocabulary | Union)
        kept_NK = torch.isin(target.ids, torch.tensor(support.ids, device=target.ids.device))
    stops = torch.tensor(stop_ids, dtype=torch.long, device=target.ids.device)
    kept_NK = valid_NK & (kept_NK | torch.isin(target.ids, stops))
    return _without(target, ~kept_NK)


def on_the_same_ids(view: Target, other: Target) -> Target:
    """The view without the ids that the other does not speak of, column by column: both have the same tail then."""
    view, other = _as_ids(view), _as_ids(other)
    assert other.ids is not None
    return _without(view, other.ids < 0)


def _without(target: Target, dropped_NK: Tensor) -> Target:
    """Some columns less. The exact mass stays exact but for what is dropped: the rounding of what is kept does not enter the tail."""
    assert target.ids is not None
    dropped_NK = dropped_NK | (target.ids < 0)
    support_NK = target.support.masked_fill(dropped_NK, -torch.inf)
    mass_N = target.mass
    if mass_N is not None:
        lost_NK = target.support.masked_fill(~dropped_NK | (target.ids < 0), -torch.inf)
        mass_N = (mass_N - lost_NK.exp().sum(1)).clamp(min=0)
    return target._replace(ids=target.ids.masked_fill(dropped_NK, -1), support=support_NK, mass=mass_N)


def _best(values_NK: Tensor, k: int) -> Tensor:
    """[N, K] whether a column is among its row's k highest."""
    columns_Nk = values_NK.topk(min(k, values_NK.shape[1]), 1).indices
    return torch.zeros_like(values_NK, dtype=torch.bool).scatter_(1, columns_Nk, True)


def _as_ids(target: Target) -> Target:
    """A whole vocabulary is a support of all ids."""
    if target.ids is not None:
        return target
    rows, vocab = target.support.shape
    return target._replace(ids=torch.arange(vocab, device=target.support.device).expand(rows, vocab))


# ---------------------------------------------------------------- what is left
def _parted(logits_NV: Tensor, ids_NK: Tensor, stops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the ids and the stop ids, [N] the log-sum of all others (exact, not 1 − Σ), and the rows where there are none."""
    last_N1 = ids_NK.amax(1, keepdim=True) if ids_NK.shape[1] else torch.full_like(logits_NV[:, :1], -1, dtype=torch.long)
    spare_N1 = torch.where(last_N1 < 0, stops[0] if len(stops) else 0, last_N1)  # padding hides what is hidden anyway
    held_NH = torch.cat([torch.where(ids_NK < 0, spare_N1, ids_NK), stops.expand(len(ids_NK), -1)], 1)
    hides_N1 = (last_N1 >= 0) | bool(len(stops))  # where neither id nor stop is asked for, everything is rest
    logit_NH, rest_N = Parted.apply(logits_NV, held_NH, hides_N1)  # type: ignore[no-untyped-call]
    return logit_NH, rest_N, rest_N.detach() < HIDDEN / 2


class Parted(torch.autograd.Function):
    """Some logits, and the log-sum of the others: one array beside the logits, and one for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, held_NH: Tensor, hides_N1: Tensor) -> tuple[Tensor, Tensor]:
        logit_NH = logits_NV.gather(1, held_NH)
        others_NV = logits_NV.scatter(1, held_NH, logit_NH.masked_fill(hides_N1, HIDDEN))
        most_N1 = others_NV.amax(1, keepdim=True)
        total_N1 = others_NV.sub_(most_N1).exp_().sum(1, keepdim=True)
        ctx.save_for_backward(others_NV, held_NH, total_N1)
        return logit_NH, (total_N1.log() + most_N1)[:, 0]

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor, rest_N: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        others_NV, held_NH, total_N1 = ctx.saved_tensors
        return (others_NV * (rest_N[:, None] / total_N1)).scatter_add_(1, held_NH, grad_NH), None, None


def _teacher_tail(target: Target, q_NC: Tensor, valid_NK: Tensor, stops: Tensor) -> Tensor:
    """[N] log of what the teacher's cells leave. `mass` is exact where the float16 support is not."""
    assert target.ids is not None
    held_N = q_NC.exp().sum(1) if target.mass is None else target.mass.to(q_NC.dtype)
    if target.mass is not None and len(stops):
        stop_NK = valid_NK & torch.isin(target.ids, stops)
        single_N = target.support.to(q_NC.dtype).exp().masked_fill(~stop_NK, 0).sum(1)
        missing_N = stop_NK.sum(1) < len(stops)  # the class holds more than the support did
        held_N = torch.where(missing_N, held_N + q_NC[:, -1].exp() - single_N, held_N)
    return (1 - held_N).clamp(min=LEAST_TAIL).log()


def _bounded(logp: Tensor) -> Tensor:
    return logp.clamp(min=NEVER)
