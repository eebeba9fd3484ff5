"""How far apart: divergences over cells, and their policy-gradient coefficients at one token. p the student, q the target.

[N, C] log-masses to [N] nats; or [...] log-probs to coefficients of the same shape.
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor

from streamopd.slots import (
    JSD,
    ArgmaxCrossEntropy,
    ForwardKL,
    ListwiseRanking,
    Loss,
    Power,
    ReverseKL,
    SkewForward,
    SkewReverse,
    TotalVariation,
)

from .cells import NEVER, Cells

MOST_LOG_RATIO = 20.0  # of q / p where it is exponentiated; beyond it a float32 gradient is no longer one


def diverge(cells: Cells, loss: Loss) -> Tensor:
    """The divergence that the slot names, differentiable in p."""
    if isinstance(loss, ArgmaxCrossEntropy):
        return _argmax_cross_entropy(cells)
    if isinstance(loss, ListwiseRanking):
        return plackett_luce(cells, loss.k)
    return Divergence.apply(cells.p, cells.q, loss)  # type: ignore[no-any-return, no-untyped-call]


class Divergence(torch.autograd.Function):
    """With its gradient in closed form: autograd would keep every factor, and over a whole vocabulary each is as large as the logits."""

    @staticmethod
    def forward(ctx: Any, p_NC: Tensor, q_NC: Tensor, loss: Loss) -> Tensor:
        ctx.save_for_backward(p_NC, q_NC)
        ctx.loss = loss
        return _distance(p_NC, q_NC, loss)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        p_NC, q_NC = ctx.saved_tensors
        return slope(p_NC, q_NC, ctx.loss).mul_(grad_N[:, None]), None, None


def _distance(p_NC: Tensor, q_NC: Tensor, loss: Loss) -> Tensor:
    if isinstance(loss, ReverseKL):
        return kl_student_teacher(p_NC, q_NC)
    if isinstance(loss, ForwardKL):
        return kl_teacher_student(p_NC, q_NC)
    if isinstance(loss, JSD):
        return jensen_shannon(p_NC, q_NC, loss.beta)
    if isinstance(loss, SkewForward):
        return kl_teacher_student(_mixed(q_NC, p_NC, loss.alpha), q_NC)
    if isinstance(loss, SkewReverse):
        return kl_student_teacher(p_NC, _mixed(p_NC, q_NC, loss.alpha))
    if isinstance(loss, TotalVariation):
        return 0.5 * (p_NC.exp() - q_NC.exp()).abs().sum(-1)
    raise AssertionError(f"{type(loss).__name__} is no divergence over cells")


def slope(p_NC: Tensor, q_NC: Tensor, loss: Loss) -> Tensor:
    """∂ divergence / ∂ log p, in an array of its own."""
    if isinstance(loss, ReverseKL) or (isinstance(loss, JSD) and loss.beta >= 1) or (isinstance(loss, SkewReverse) and loss.alpha <= 0):
        return (p_NC - q_NC).add_(1).mul_(p_NC.exp())
    if isinstance(loss, ForwardKL) or (isinstance(loss, JSD) and loss.beta <= 0):
        return q_NC.exp().neg_()
    if isinstance(loss, JSD):
        return (p_NC - _mixed(q_NC, p_NC, loss.beta)).mul_(p_NC.exp()).mul_(1 - loss.beta)
    if isinstance(loss, SkewForward):
        return (p_NC - _mixed(q_NC, p_NC, loss.alpha)).add_(q_NC).exp_().mul_(loss.alpha - 1)
    if isinstance(loss, SkewReverse):
        over_NC = p_NC - _mixed(p_NC, q_NC, loss.alpha)
        return over_NC.add_(1).sub_((over_NC - 1).exp_().mul_(loss.alpha)).mul_(p_NC.exp())
    assert isinstance(loss, TotalVariation)
    return (p_NC - q_NC).sign_().mul_(p_NC.exp()).mul_(0.5)


def kl_student_teacher(p_NC: Tensor, q_NC: Tensor) -> Tensor:
    """KL(p‖q), reverse."""
    return _dot(p_NC.exp(), p_NC - q_NC)


def kl_teacher_student(p_NC: Tensor, q_NC: Tensor) -> Tensor:
    """KL(q‖p), forward."""
    return _dot(q_NC.exp(), q_NC - p_NC)


def _dot(a_NC: Tensor, b_NC: Tensor) -> Tensor:
    """Σ a b of each row, without their product."""
    return torch.bmm(a_NC[:, None, :], b_NC[:, :, None])[:, 0, 0]


def jensen_shannon(p_NC: Tensor, q_NC: Tensor, beta: float) -> Tensor:
    """β KL(q‖m) + (1−β) KL(p‖m). As written it is 0 at both ends: there the limits of it over β, and over 1−β, are meant."""
    if beta <= 0:
        return kl_teacher_student(p_NC, q_NC)
    if beta >= 1:
        return kl_student_teacher(p_NC, q_NC)
    m_NC = _mixed(q_NC, p_NC, beta)
    return beta * kl_student_teacher(q_NC, m_NC) + (1 - beta) * kl_student_teacher(p_NC, m_NC)


def plackett_luce(cells: Cells, k: int) -> Tensor:
    """−log probability that the student, drawing without replacement, takes its own top `k` in the teacher's order.

    Each factor is over what has not been taken yet: summing from the front would reward the reversed order.
    """
    singles = slice(None, -1) if cells.tail else slice(None)
    p_NC, q_NC = cells.p[:, singles], cells.q[:, singles]
    best_Nk = p_NC.detach().topk(min(k, p_NC.shape[1]), 1).indices
    p_Nk, q_Nk = p_NC.gather(1, best_Nk), q_NC.gather(1, best_Nk)
    ranked_Nk = p_Nk.gather(1, q_Nk.argsort(stable=True, dim=1, descending=True))
    left_Nk = ranked_Nk.flip(1).logcumsumexp(1).flip(1)
    return (left_Nk - ranked_Nk).masked_fill(ranked_Nk.detach() <= NEVER / 2, 0).sum(1)


def by_candidates(cells: Cells, loss: Loss, share: bool) -> Tensor:
    """Σ p(v) sg[−a(v)], a the coefficient of candidate v: the gradient runs through the weight p(v) alone; `share`: p(v) / p(S).

    At S = V this is the divergence's own gradient, of a truncated support it leaves out a term that does not cancel there.
    """
    told_NC = -coefficient(cells.p.detach(), cells.q, loss).masked_fill(cells.q <= NEVER / 2, 0)
    held_N1 = cells.p.detach().exp().sum(1, keepdim=True).clamp(min=torch.finfo(cells.p.dtype).tiny) if share else 1.0
    return (cells.p.exp() * (told_NC / held_N1)).sum(1)


def coefficient(logp: Tensor, logq: Tensor, loss: Loss) -> Tensor:
    """a with E_p[a ∇log p] = −∇ divergence: u f'(u) − f(u) at u = q/p (OPD+, arXiv 2606.01039), less its value at u = 1.

    That constant is a baseline: it changes no expectation, and teacher = student gives exactly 0.
    """
    gap = (logq - logp).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
    if isinstance(loss, ReverseKL):
        return logq - logp
    if isinstance(loss, ForwardKL):
        return gap.expm1()
    if isinstance(loss, JSD):
        return _jsd_coefficient(gap, logq - logp, loss.beta)
    if isinstance(loss, SkewForward):
        a = loss.alpha
        return (1 - a) * (gap.exp() / (a * gap.exp() + 1 - a) - 1)
    if isinstance(loss, SkewReverse):
        a = loss.alpha
        m = (1 - a) * gap.exp() + a
        return m.log() - (1 - a) * (gap.exp() / m - 1)
    if isinstance(loss, TotalVariation):
        return 0.5 * gap.sign()
    if isinstance(loss, Power):
        return (loss.exponent * logq).exp() - (loss.exponent * logp).exp()
    raise AssertionError(f"{type(loss).__name__} has no coefficient")


def _jsd_coefficient(gap: Tensor, exact_gap: Tensor, beta: float) -> Tensor:
    """(1−β) log(β u + 1 − β)."""
    if beta <= 0:
        return gap.expm1()
    if beta >= 1:
        return exact_gap
    return (1 - beta) * (beta * gap.exp() + 1 - beta).log()


def _mixed(a_NC: Tensor, b_NC: Tensor, share: float) -> Tensor:
    """log(share · a + (1 − share) · b); the ends are exact."""
    if share <= 0:
        return b_NC
    if share >= 1:
        return a_NC
    return torch.logaddexp(a_NC + log(share), b_NC + log(1 - share))


def _argmax_cross_entropy(cells: Cells) -> Tensor:
    """−log p of the single cell that q likes best."""
    singles = cells.q[:, :-1] if cells.tail else cells.q
    return -cells.p.gather(1, singles.argmax(1, keepdim=True))[:, 0]
