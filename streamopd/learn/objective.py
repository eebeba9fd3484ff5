"""How far the student is from the teacher, token by token: one partition on both sides, then a divergence.

    logits_NV ── merge stop ids ── partition {support ids} ∪ {rest} ── divergence ──> loss_N

Partition law (core.md I11): at each position both sides are coarse-grained by the same cells. A cell is one id, the stop
ids together (ending is one action, whichever id says it), or the tail: everything else. What is padded or cannot occur has
log-mass `NEVER` on both sides and contributes nothing, in value and in gradient. So any fixed support gives a lower bound
of the exact divergence, and S = V, whose tail is empty, gives the divergence itself.

Shapes: N tokens of a chunk, V vocabulary, K support columns, C cells. p the student, q the teacher (never differentiated).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from streamopd.errors import UserError
from streamopd.slots import JSD, Divergence, ForwardKL, FullVocabulary, Method, ReverseKL, Union

NEVER = -1e4            # log-mass of a cell that cannot occur: finite, so that 0 · log 0 is 0 and gradients stay finite
HIDDEN = -1e30          # logit of an id that another cell accounts for
LEAST_TAIL = 2.0**-24   # a tail that exists is never smaller: the resolution of the float32 `mass` it is computed from


class Target(NamedTuple):
    """What the teacher says about N tokens, as evidence carries it."""

    sampled: Tensor                      # int64 [N]  the ids the student wrote
    support: Tensor                      # float32 [N, K], or [N, V] when `ids` is None; -inf pads
    ids: Tensor | None = None            # int64 [N, K]; -1 pads
    mass: Tensor | None = None           # float32 [N]  of the whole support, before its rounding to float16
    stop_logmass: Tensor | None = None   # float32 [N]  of all stop ids together


class Verdict(NamedTuple):
    """Of N tokens: the loss, with gradient; the rest are monitors without."""

    loss: Tensor          # [N] nats
    kl: Tensor            # [N] KL(p‖q) over the same partition: exact for the whole vocabulary, else a lower bound
    logp: Tensor          # [N] log p(sampled id)
    entropy: Tensor       # [N] H(p), whole vocabulary
    student_mass: Tensor  # [N] p(S)
    teacher_mass: Tensor  # [N] q(S)
    stop_logp: Tensor     # [N] log p(stop)


def judge(logits_NV: Tensor, target: Target, method: Method, stop_ids: Sequence[int]) -> Verdict:
    """The method's loss of each token, and what its monitors need. UserError when the two vocabularies differ in size."""
    logits_NV = logits_NV.float() if logits_NV.dtype in (torch.float16, torch.bfloat16) else logits_NV
    if isinstance(method.support, FullVocabulary):
        p_NC, q_NC = on_vocabulary(logits_NV, target, stop_ids)
    else:
        p_NC, q_NC = on_partition(logits_NV, target, method.support, stop_ids)
    loss_N = diverge(p_NC, q_NC, method.divergence)
    with torch.no_grad():
        return Verdict(loss_N, kl_student_teacher(p_NC, q_NC), *_monitor(logits_NV, target, stop_ids, p_NC, q_NC))


# ---------------------------------------------------------------- partitions
def on_vocabulary(logits_NV: Tensor, target: Target, stop_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-masses [N, C] of both sides with one cell an id, the stop ids together."""
    if target.support.shape != logits_NV.shape:
        raise UserError(
            f"The teacher speaks of {target.support.shape[1]} ids, the student of {logits_NV.shape[1]}: a divergence over the "
            'whole vocabulary needs one vocabulary. Choose a method with a support of ids, like "forward_kl_topk".'
        )
    p_NV = logits_NV.log_softmax(-1)
    q_NV = target.support.to(p_NV.dtype).clamp(min=NEVER)
    if len(stop_ids) < 2:
        return p_NV, q_NV
    stops = torch.tensor(stop_ids, device=p_NV.device)
    return _merge_columns(p_NV, stops), _merge_columns(q_NV, stops)


def on_partition(
    logits_NV: Tensor, target: Target, union: Union, stop_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Log-masses [N, C] of both sides over {support ids} ∪ {stop class} ∪ {tail}, by the union's `remainder`."""
    assert target.ids is not None, "a support of ids was asked for, and the evidence carries the whole vocabulary"
    stops = torch.tensor(list(stop_ids) if _merges(target, union, stop_ids) else [], dtype=torch.long, device=logits_NV.device)
    valid_NK = target.ids >= 0
    single_NK = valid_NK & ~torch.isin(target.ids, stops)  # cells of one id
    logit_NC = logits_NV.gather(1, target.ids.clamp(min=0)).masked_fill(~single_NK, HIDDEN)
    q_NC = target.support.to(logits_NV.dtype).clamp(min=NEVER).masked_fill(~single_NK, NEVER)
    if len(stops):
        assert target.stop_logmass is not None
        logit_NC = torch.cat([logit_NC, logits_NV[:, stops].logsumexp(1, keepdim=True)], 1)
        q_NC = torch.cat([q_NC, target.stop_logmass[:, None].to(q_NC.dtype).clamp(min=NEVER)], 1)
    if union.remainder == "renorm":
        return _bounded(logit_NC.log_softmax(-1)), q_NC.log_softmax(-1)
    rest_N, none_left_N = _rest(logits_NV, target.ids, stops)
    p_NC = torch.cat([logit_NC, rest_N[:, None]], 1)
    p_NC = _bounded(p_NC - p_NC.logsumexp(1, keepdim=True))
    if union.remainder == "drop":
        return p_NC[:, :-1], q_NC
    tail_N = _teacher_tail(target, q_NC, valid_NK, stops).masked_fill(none_left_N, NEVER)
    return p_NC, torch.cat([q_NC, tail_N[:, None]], 1).log_softmax(-1)  # takes back what float16 rounded off


def _merges(target: Target, union: Union, stop_ids: Sequence[int]) -> bool:
    return union.stop and len(stop_ids) > 1 and target.stop_logmass is not None


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


# ---------------------------------------------------------------- divergences, [N, C] log-masses to [N] nats
def diverge(p_NC: Tensor, q_NC: Tensor, divergence: Divergence) -> Tensor:
    """The divergence that the slot names."""
    if isinstance(divergence, ReverseKL):
        return kl_student_teacher(p_NC, q_NC)
    if isinstance(divergence, ForwardKL):
        return kl_teacher_student(p_NC, q_NC)
    return jensen_shannon(p_NC, q_NC, divergence)


def kl_student_teacher(p_NC: Tensor, q_NC: Tensor) -> Tensor:
    """KL(p‖q), reverse."""
    return (p_NC.exp() * (p_NC - q_NC)).sum(-1)


def kl_teacher_student(p_NC: Tensor, q_NC: Tensor) -> Tensor:
    """KL(q‖p), forward."""
    return (q_NC.exp() * (q_NC - p_NC)).sum(-1)


def jensen_shannon(p_NC: Tensor, q_NC: Tensor, jsd: JSD) -> Tensor:
    """β KL(q‖m) + (1−β) KL(p‖m). As written it is 0 at both ends: there the limits of it over β, and over 1−β, are meant."""
    if jsd.beta <= 0:
        return kl_teacher_student(p_NC, q_NC)
    if jsd.beta >= 1:
        return kl_student_teacher(p_NC, q_NC)
    m_NC = torch.logaddexp(q_NC + log(jsd.beta), p_NC + log(1 - jsd.beta))
    return jsd.beta * (q_NC.exp() * (q_NC - m_NC)).sum(-1) + (1 - jsd.beta) * (p_NC.exp() * (p_NC - m_NC)).sum(-1)


# ---------------------------------------------------------------- monitors
def _monitor(
    logits_NV: Tensor, target: Target, stop_ids: Sequence[int], p_NC: Tensor, q_NC: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log p(sampled), H(p), p(S), q(S), log p(stop)."""
    total_N1 = logits_NV.logsumexp(1, keepdim=True)
    p_NV = (logits_NV - total_N1).exp_()
    entropy_N = total_N1[:, 0] - torch.linalg.vecdot(p_NV, logits_NV)
    logp_N = (logits_NV.gather(1, target.sampled[:, None]) - total_N1)[:, 0]
    stop_N = (logits_NV[:, list(stop_ids)].logsumexp(1) - total_N1[:, 0]) if stop_ids else torch.zeros_like(logp_N)
    if target.ids is None:
        ones = torch.ones_like(logp_N)
        return logp_N, entropy_N, ones, ones, stop_N
    student_mass_N = p_NV.gather(1, target.ids.clamp(min=0)).masked_fill_(target.ids < 0, 0).sum(1)
    teacher_mass_N = target.mass if target.mass is not None else target.support.exp().sum(1)
    return logp_N, entropy_N, student_mass_N, teacher_mass_N, stop_N


def overlap(logits_NV: Tensor, target: Target, k: int) -> Tensor:
    """[N] |top-k(p) ∩ top-k(q)| / k; the teacher's top-k are the k best of its support."""
    teacher_Nk = target.support.topk(min(k, target.support.shape[1])).indices
    if target.ids is not None:
        teacher_Nk = target.ids.gather(1, teacher_Nk)
    student_Nk = logits_NV.topk(min(k, logits_NV.shape[1])).indices
    return (student_Nk[:, :, None] == teacher_Nk[:, None, :]).any(2).float().mean(1)
