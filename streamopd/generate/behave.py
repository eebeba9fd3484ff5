"""Behaviours as arithmetic: from two kernels, the one that a token is drawn from, and who wrote it. No state.

Legend: B rows, V ids, K of a top-k. p is the student's kernel at the run's temperature and top-p, q the teacher's at the
same temperature. Top-p cuts p alone, before anything is blended: what comes from q may lie outside the student's nucleus.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from streamopd.slots import Behaviour, Coin, GeometricBlend, Interleave, Mixture

from .commission import plain
from .kernel import invert_cdf, kernel_logp

HALVINGS = 24  # of [0, 1]: β to 6e-8


class Drawn(NamedTuple):
    """A token a row."""

    ids_B: Tensor
    logp_B: Tensor        # of the kernel that really sampled
    by_teacher_B: Tensor  # bool


def draw(behaviour: Behaviour, p_BV: Tensor, q_BV: Tensor, handed_B: Tensor, uniform_B: Tensor, second_B: Tensor) -> Drawn:
    """The next token of rows under one behaviour; `handed_B` says which rows are the teacher's to write, alone.

    A blend's tokens are the student's: its log-probs say how far from p it is. `second_B` are draws independent of `uniform_B`.
    """
    match behaviour:
        case Interleave(k=k):
            return interleave(p_BV, q_BV, k, uniform_B, second_B)
        case Coin(greedy=True):  # of log-probs at temperature 1
            logp_B, ids_B = q_BV.max(-1)
            return Drawn(ids_B, logp_B, handed_B)
        case Mixture(alpha=alpha):
            mu_BV = mixture(p_BV, q_BV, plain(alpha))
        case GeometricBlend(epsilon=epsilon):
            _, mu_BV = geometric_blend(p_BV, q_BV, plain(epsilon))
        case _:
            mu_BV = torch.where(handed_B[:, None], q_BV, p_BV)
    ids_B = invert_cdf(mu_BV.exp(), uniform_B)
    return Drawn(ids_B, _of(mu_BV, ids_B), handed_B)


def given_logp(logits_BV: Tensor, ids_B: Tensor, temperature: float) -> Tensor:
    """Log-probs [B] of ids that nobody drew, under the student's kernel before top-p, which may leave them out.

    Temperature 0: at temperature 1, as of what is drawn.
    """
    return _of(kernel_logp(logits_BV, temperature or 1.0, 1.0), ids_B)


def kernel_of(behaviour: Behaviour, temperature: float, top_p: float) -> tuple[float, float]:
    """(temperature, top-p) that an answer is said to have: top-p never cuts what a teacher or the dataset writes alone."""
    if isinstance(behaviour, Coin):
        return 0.0 if behaviour.greedy else temperature, 1.0
    return temperature, top_p


def mixture(p_BV: Tensor, q_BV: Tensor, alpha: float) -> Tensor:
    """log(α q + (1−α) p), [B, V] (MiniLLM, arXiv 2306.08543)."""
    teacher, student = q_BV.new_tensor([alpha, 1 - alpha]).log()
    return torch.logaddexp(teacher + q_BV, student + p_BV)


def geometric_blend(p_BV: Tensor, q_BV: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(β [B], log mu [B, V]) of mu ∝ p^(1−β) q^β, the nearest to q with KL(mu‖p) ≤ ε nats (TRB, arXiv 2605.31159).

    KL(mu‖p) grows with β, so halving finds it: ε = 0 is p, ε ≥ KL(q‖p) is q. Where top-p has cut p, q is cut alike, else
    no ε would reach it.
    """
    low_B1 = p_BV.new_zeros(len(p_BV), 1)
    if epsilon == 0:
        return low_B1.squeeze(-1), p_BV
    q_BV = q_BV.masked_fill(p_BV == -torch.inf, -torch.inf).log_softmax(-1)
    high_B1 = torch.ones_like(low_B1)
    for _ in range(HALVINGS):
        middle_B1 = (low_B1 + high_B1) / 2
        inside_B1 = kl(_between(p_BV, q_BV, middle_B1), p_BV)[:, None] <= epsilon
        low_B1, high_B1 = torch.where(inside_B1, middle_B1, low_B1), torch.where(inside_B1, high_B1, middle_B1)
    mu_BV = torch.where(low_B1 > 0, _between(p_BV, q_BV, low_B1), p_BV)
    whole_B = kl(q_BV, p_BV) <= epsilon
    beta_B = torch.where(whole_B, 1.0, low_B1.squeeze(-1))
    return beta_B, torch.where(whole_B[:, None], q_BV, mu_BV)


def interleave(p_BV: Tensor, q_BV: Tensor, k: int, uniform_B: Tensor, second_B: Tensor) -> Drawn:
    """y ~ p, kept iff it is in the teacher's top k, else drawn anew from q (speculative KD, arXiv 2410.11325).

    The kernel of both draws is mu(v) = p(v) 1[v ∈ T_k] + p(not T_k) q(v). A token drawn anew is the teacher's, wherever it lies.
    """
    likely_BK = q_BV.topk(min(k, q_BV.shape[-1]), -1).indices
    outside_BV = torch.ones_like(q_BV, dtype=torch.bool).scatter_(-1, likely_BK, False)
    proposed_B = invert_cdf(p_BV.exp(), uniform_B)
    replaced_B = outside_BV.gather(-1, proposed_B[:, None]).squeeze(-1)
    ids_B = torch.where(replaced_B, invert_cdf(q_BV.exp(), second_B), proposed_B)
    kept_BV = p_BV.masked_fill(outside_BV, -torch.inf)
    refused_B1 = p_BV.masked_fill(~outside_BV, -torch.inf).logsumexp(-1, keepdim=True)
    return Drawn(ids_B, _of(torch.logaddexp(kept_BV, refused_B1 + q_BV), ids_B), replaced_B)


def spikes(divergence: float, past: Collection[float], factor: float, window: int) -> bool:
    """Whether a token's KL(p‖q) exceeds `factor` times its mean over `past`, the `window` tokens before (AdaSwitch, arXiv 2510.07842).

    While there are fewer of them, nothing is a spike.
    """
    return len(past) == window and divergence > factor * sum(past) / window


def kl(one_BV: Tensor, other_BV: Tensor) -> Tensor:
    """KL(one‖other) of log-probs, [B] nats; what `one` never draws counts nothing."""
    return (one_BV.exp() * (one_BV - other_BV)).masked_fill(one_BV == -torch.inf, 0).sum(-1)


def _between(p_BV: Tensor, q_BV: Tensor, beta_B1: Tensor) -> Tensor:
    """log of p^(1−β) q^β, normalised; 0 < β < 1 where either is -inf."""
    return ((1 - beta_B1) * p_BV + beta_B1 * q_BV).log_softmax(-1)


def _of(logp_BV: Tensor, ids_B: Tensor) -> Tensor:
    return logp_BV.gather(-1, ids_B[:, None]).squeeze(-1)
