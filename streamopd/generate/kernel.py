"""The sampling kernel: what distribution a token is drawn from, and the draw. Shapes: B rows, V ids, K of a top-k."""

from __future__ import annotations

import torch
from torch import Tensor

HEAD = 1024  # most nuclei lie within so many ids, and finding those is far cheaper than sorting a vocabulary


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """(ids_B, logp_B): a token a row, and its log-probability under the kernel that drew it.

    Temperature 0 is greedy, and its log-probs are at temperature 1 over the whole vocabulary.
    """
    if temperature == 0:
        logp_BV = logits_BV.log_softmax(-1)
        ids_B = logp_BV.argmax(-1)
    else:
        logp_BV = kernel_logp(logits_BV, temperature, top_p)
        ids_B = invert_cdf(logp_BV.exp(), uniform_B)
    return ids_B, logp_BV.gather(-1, ids_B[:, None]).squeeze(-1)


def kernel_logp(logits_BV: Tensor, temperature: float, top_p: float) -> Tensor:
    """Log-probs after temperature and top-p, renormalised, [B, V]; -inf outside the nucleus.

    The nucleus is the smallest set of most probable ids whose mass reaches `top_p`; ties at its border are all in.
    """
    logp_BV = (logits_BV if temperature == 1 else logits_BV / temperature).log_softmax(-1)
    if top_p >= 1:
        return logp_BV
    sorted_BK = logp_BV.topk(min(HEAD, logp_BV.shape[-1]), -1).values
    if sorted_BK.exp().sum(-1).min() < top_p:  # a flat row: its nucleus is wider than the head
        sorted_BK = logp_BV.sort(-1, descending=True).values
    mass_BK = sorted_BK.exp()
    inside_BK = mass_BK.cumsum(-1) - mass_BK < top_p
    least_B1 = sorted_BK.gather(-1, (inside_BK.sum(-1, keepdim=True) - 1).clamp_(min=0))
    return logp_BV.masked_fill(logp_BV < least_B1, -torch.inf).log_softmax(-1)


def invert_cdf(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The id v with cdf[v-1] <= u < cdf[v], [B]; one uniform a row, so a row's draw depends on no other row.

    An id of probability 0 is never drawn: the largest float32 below 1, times a total near 1, rounds to below it.
    """
    cdf_BV = probs_BV.cumsum(-1)
    target_B1 = uniform_B[:, None] * cdf_BV[:, -1:]
    ids_B = torch.searchsorted(cdf_BV, target_B1, right=True).squeeze(-1)
    return ids_B.clamp_(max=probs_BV.shape[-1] - 1)  # a row of NaN finds no place; its log-prob tells


def top_k(logits_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids_BK int32, logp_BK float16) of the k most probable ids at temperature 1, most probable first."""
    values_BK, ids_BK = logits_BV.topk(min(k, logits_BV.shape[-1]), -1)
    return ids_BK.int(), (values_BK - logits_BV.logsumexp(-1, keepdim=True)).half()
