"""The loss of each token of a chunk, with gradient, and what its monitors need.

    logits_NV ── merge stop ids ── partition ── aim ── divergence × order ──> loss_N

Policy gradients tell log p of the written token alone; direct losses sum over cells. Orders come from `instruct`, here for
this chunk, or from a survey of the whole step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from streamopd.slots import (
    Branch,
    Entropy,
    Extrapolate,
    GoldOrGuess,
    Likelihood,
    Method,
    ReferenceKL,
)

from .aim import aim, normalised
from .cells import Cells
from .divergence import by_candidates, diverge, kl_student_teacher
from .facts import Look, Observed
from .orders import instruct


class Verdict(NamedTuple):
    """Of N tokens: the loss, with gradient; the rest are monitors without, absent where nobody can know them."""

    loss: Tensor                  # [N] nats
    logp: Tensor                  # [N] log p(written id)
    kernel_logp: Tensor           # [N] the same through the temperature that sampled
    entropy: Tensor               # [N] H(p), whole vocabulary
    stop_logp: Tensor             # [N] log p(stop)
    kl: Tensor | None             # [N] KL(p‖q) over the evidence's partition: exact for the whole vocabulary, else a lower bound
    student_mass: Tensor | None   # [N] p(S)
    teacher_mass: Tensor | None   # [N] q(S)


def judge(look: Look, method: Method, orders: Tensor | None = None) -> Verdict:
    """The method's loss of each token. `method` is settled (`Method.at`); `orders` [branches, N] from a survey, or made here."""
    if orders is None:
        orders = instruct(Observed(look, method), look.known, method)
    loss_N = torch.zeros_like(look.total_N1[:, 0])
    for branch, order_N in zip(method.branches, orders, strict=True):
        if bool((order_N != 0).any()):
            loss_N = loss_N + spoken(branch, order_N, look)
    return Verdict(loss_N, *_monitors(look))


def spoken(branch: Branch, order_N: Tensor, look: Look) -> Tensor:
    """[N] what a branch says, times its order."""
    told_N = -look.logp_N if branch.form == "policy_gradient" or isinstance(branch.loss, Likelihood) else _summed(branch, look)
    return torch.where(order_N != 0, told_N * order_N, 0.0)


def _summed(branch: Branch, look: Look) -> Tensor:
    if isinstance(branch.loss, Entropy):
        return look.entropy()
    if isinstance(branch.loss, ReferenceKL):
        cells = look.cells(branch.support, of_reference=True)
        return kl_student_teacher(cells.p, cells.q)
    if isinstance(branch.loss, GoldOrGuess):
        return _gold_or_guess(look)
    cells = aimed(branch, look)
    if branch.form == "direct":
        return diverge(cells, branch.loss)
    return by_candidates(cells, branch.loss, share=branch.form == "per_candidate")


def aimed(branch: Branch, look: Look) -> Cells:
    """The cells of the branch's support, the target in the teacher's place."""
    cells = look.cells(branch.support)
    reference = look.cells(branch.support, of_reference=True).q if isinstance(branch.target, Extrapolate) else None
    return cells._replace(q=normalised(aim(cells.p, cells.q, reference, branch.target), cells.q, branch.target))


def _gold_or_guess(look: Look) -> Tensor:
    """HPD: a₁ of the written token, a₂ of the student's own likeliest one where that is another."""
    guess, logp_N, logq_N = look.likeliest, look.logp_N.detach(), look.said_N(look.teacher)
    k1_N = (logq_N - logp_N) * logp_N.exp()
    a2_N = ((guess.logq - guess.logp) * guess.logp.exp()).detach().clamp(max=0).nan_to_num(neginf=0.0)
    a2_N = a2_N.masked_fill(guess.written, 0.0)
    bonus_N = (k1_N > 0).to(k1_N.dtype) * (1 + (a2_N < 0).to(k1_N.dtype)) * logq_N.exp()
    return -((k1_N + bonus_N) * look.logp_N + a2_N * guess.logp)


@torch.no_grad()
def _monitors(look: Look) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    own = (look.token_logp_N.detach(), look.kernel_logp_N, look.entropy_N, look.stop_logp_N.detach())
    view = look.views.teacher
    if view is None:
        return (*own, None, None, None)
    cells = look.cells(look.widest)
    kl_N = kl_student_teacher(cells.p, cells.q)
    if view.ids is None:
        return (*own, kl_N, torch.ones_like(kl_N), torch.ones_like(kl_N))
    p_NK = (look.logits_NV.gather(1, view.ids.clamp(min=0)) - look.total_N1).exp().masked_fill(view.ids < 0, 0)
    teacher_mass_N = view.mass if view.mass is not None else view.support.exp().sum(1)
    return (*own, kl_N, p_NK.sum(1), teacher_mass_N)


def overlap(look: Look, k: int, stride: int) -> Tensor:
    """[every stride-th token] |top-k(p) ∩ top-k(q)| / k; the teacher's top-k are the k best of its support."""
    view, logits_NV = look.teacher, look.logits_NV.detach()[::stride]
    support = view.support[::stride]
    teacher_Nk = support.topk(min(k, support.shape[1])).indices
    if view.ids is not None:
        teacher_Nk = view.ids[::stride].gather(1, teacher_Nk)
    student_Nk = logits_NV.topk(min(k, logits_NV.shape[1])).indices
    return (student_Nk[:, :, None] == teacher_Nk[:, None, :]).any(2).float().mean(1)
