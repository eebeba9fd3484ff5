"""One partition on both sides: what a divergence is summed over.

Partition law (core.md I11): at each position both sides are coarse-grained by the same cells. A cell is one id, the stop
ids together (ending is one action, whichever id says it: arXiv 2609.20511), or the tail: everything else. What is padded or
cannot occur has log-mass `NEVER` on both sides and contributes nothing, in value and in gradient. So any fixed support gives
a lower bound of the exact divergence, and S = V, whose tail is empty, gives the divergence itself.

Shapes: N tokens of a chunk, V vocabulary, K support columns, C cells. p the student, q the teacher (never differentiated).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    p_NV = logits_NV.log_softmax(-1)
    q_NV = target.support.to(p_NV.dtype).clamp(min=NEVER)
    if len(stop_ids) < 2:
        return Cells(p_NV, q_NV)
    stops = torch.tensor(stop_ids, device=p_NV.device)
    return Cells(_merge_columns(p_NV, stops), _merge_columns(q_NV, stops))


def on_partition(logits_NV: Tensor, target: Target, remainder: Remainder, stop_ids: Sequence[int]) -> Cells:
    """{support ids} ∪ {stop class} ∪ {tail}, by `remainder`."""
    target = _as_ids(target)
    assert target.ids is not None
    merges = len(stop_ids) > 1 and target.stop_logmass is not None
    stops = torch.tensor(list(stop_ids) if merges else [], dtype=torch.long, device=logits_NV.device)
    valid_NK = target.ids >= 0
    single_NK = valid_NK & ~torch.isin(target.ids, stops)  # cells of one id
    logit_NC = logits_NV.gather(1, target.ids.clamp(min=0)).masked_fill(~single_NK, HIDDEN)
    q_NC = target.support.to(logits_NV.dtype).clamp(min=NEVER).masked_fill(~single_NK, NEVER)
    if len(stops):
        assert target.stop_logmass is not None
        logit_NC = torch.cat([logit_NC, logits_NV[:, stops].logsumexp(1, keepdim=True)], 1)
        q_NC = torch.cat([q_NC, target.stop_logmass[:, None].to(q_NC.dtype).clamp(min=NEVER)], 1)
    if remainder == "renorm":
        return Cells(_bounded(logit_NC.log_softmax(-1)), q_NC.log_softmax(-1))
    rest_N, none_left_N = _rest(logits_NV, target.ids, stops)
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
    return target._replace(ids=target.ids.masked_fill(~kept_NK, -1), support=q_NK.masked_fill(~kept_NK, -torch.inf), mass=None)


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
def _rest(logits_NV: Tensor, ids_NK: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
    """[N] log-sum of the logits that no cell holds (exact, not 1 − Σ), and the rows where there are none."""
    last_N1 = ids_NK.amax(1, keepdim=True) if ids_NK.shape[1] else torch.full_like(logits_NV[:, :1], -1, dtype=torch.long)
    empty_N = last_N1[:, 0] < 0
    spare_N1 = torch.where(last_N1 < 0, stops[0] if len(stops) else 0, last_N1)  # padding hides what is hidden anyway
    held = torch.cat([torch.where(ids_NK < 0, spare_N1, ids_NK), stops.expand(len(ids_NK), -1)], 1)
    rest_N = logits_NV.scatter(1, held, HIDDEN).logsumexp(1)
    if not len(stops) and bool(empty_N.any()):  # such a row has no cell: everything is tail
        rest_N = torch.where(empty_N, logits_NV.logsumexp(1), rest_N)
    return rest_N, rest_N.detach() < HIDDEN / 2


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


def _merge_columns(logp_NV: Tensor, columns: Tensor) -> Tensor:
    """The columns' mass together in one last cell; their own cells stay, at NEVER."""
    together_N1 = logp_NV[:, columns].logsumexp(1, keepdim=True)
    return torch.cat([logp_NV.index_fill(1, columns, NEVER), together_N1], 1)


def _bounded(logp: Tensor) -> Tensor:
    return logp.clamp(min=NEVER)
