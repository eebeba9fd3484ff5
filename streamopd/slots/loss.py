"""Loss: what a token is told. A divergence, p the student and q the target; or a likelihood, a reward, an entropy.

Names say the order of the arguments of KL: reverse is KL(p‖q) = `kl_student_teacher`, forward KL(q‖p).
"""

from __future__ import annotations

from typing import Literal

from .slot import Slot


class ReverseKL(Slot, frozen=True):
    """KL(p‖q) = Σ p (log p − log q): mode-seeking."""


class ForwardKL(Slot, frozen=True):
    """KL(q‖p) = Σ q (log q − log p): mass-covering."""


class JSD(Slot, frozen=True):
    """Generalised Jensen–Shannon (GKD, arXiv 2306.13649): β KL(q‖m) + (1−β) KL(p‖m), m = β q + (1−β) p.

    The ends are the limits divided by β and 1 − β: 0 is forward KL, 1 is reverse KL.
    """

    beta: float = 0.5


class SkewForward(Slot, frozen=True):
    """KL(q ‖ α q + (1−α) p) (DistiLLM, arXiv 2402.03898); 0 is forward KL."""

    alpha: float = 0.1


class SkewReverse(Slot, frozen=True):
    """KL(p ‖ (1−α) q + α p) (DistiLLM, arXiv 2402.03898), at most −log α; 0 is reverse KL."""

    alpha: float = 0.1


class Power(Slot, frozen=True):
    """Policy-gradient coefficient q^a − p^a of the sampled token, in [−1, 1] (PowerOPD, arXiv 2606.17199)."""

    exponent: float = 0.5


class TotalVariation(Slot, frozen=True):
    """½ Σ |p − q|."""


class ArgmaxCrossEntropy(Slot, frozen=True):
    """−log p(argmax q): the teacher's own next token."""


class ListwiseRanking(Slot, frozen=True):
    """−log of the Plackett–Luce probability that the student ranks its own top k as the teacher does (arXiv 2603.13260)."""

    k: int = 10


class Likelihood(Slot, frozen=True):
    """−log p(token that was written), whoever wrote it: cross-entropy."""


class Entropy(Slot, frozen=True):
    """H(p), to be minimised; a negative scale maximises it."""


class ReferenceKL(Slot, frozen=True):
    """KL(p‖b) over the partition, b the reference: a leash."""


class Advantage(Slot, frozen=True):
    """Policy gradient of the verifier's reward against its group: r − mean, over the group's standard deviation (GRPO,
    arXiv 2402.03300), without it ("mean"), or r − mean of the others (RLOO, arXiv 2402.14740). A group of equals gives 0."""

    kind: Literal["grpo", "mean", "rloo"] = "grpo"
    floor: float = 1e-4  # of the standard deviation


class GoldOrGuess(Slot, frozen=True):
    """Coefficients of the written token and of the student's own likeliest one, summed, on somebody else's text
    (HPD, arXiv 2604.20244): a = p (log q − log p), with q added where a > 0, or where the guess is told off."""


Loss = (
    ReverseKL | ForwardKL | JSD | SkewForward | SkewReverse | Power | TotalVariation | ArgmaxCrossEntropy | ListwiseRanking
    | Likelihood | Entropy | ReferenceKL | Advantage | GoldOrGuess
)

# direct           back-propagated through the divergence itself
# stop_gradient    through the weight p(v) alone: Σ p(v) sg[log p − log q] (arXiv 2605.11182)
# per_candidate    the same with p(v) / p(S) (arXiv 2604.13016)
# policy_gradient  −sg[coefficient] log p(token that was written), coefficient u f'(u) − f(u) at u = q/p (arXiv 2606.01039)
Form = Literal["direct", "stop_gradient", "per_candidate", "policy_gradient"]
