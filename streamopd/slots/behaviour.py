"""Behaviour: who writes an answer, token by token. All but the first need a teacher inside the generator.

p the student's kernel, q the teacher's. `logprobs` of a rollout are those of the kernel that really sampled, and its
`authors` say who wrote which tokens.
"""

from __future__ import annotations

from typing import ClassVar

from .slot import Scalar, Slot


class Behaviour(Slot, frozen=True):
    """Base of the settings below."""

    teacher: ClassVar[bool] = True  # whether a teacher must sit in the generator


class OnPolicy(Behaviour, frozen=True):
    """The student, alone."""

    teacher: ClassVar = False


class Until(Behaviour, frozen=True):
    """The student, for so many tokens (ESR, arXiv 2605.27028)."""

    teacher: ClassVar = False
    tokens: Scalar = 100.0


class Mixture(Behaviour, frozen=True):
    """mu = α q + (1−α) p at every token (MiniLLM, arXiv 2306.08543)."""

    alpha: Scalar = 0.2


class GeometricBlend(Behaviour, frozen=True):
    """mu ∝ p^(1−β) q^β, the nearest to q with KL(mu‖p) ≤ ε; β by bisection (TRB, arXiv 2605.31159)."""

    epsilon: Scalar = 0.05


class Interleave(Behaviour, frozen=True):
    """The student proposes; what is not in the teacher's top k is drawn from q instead (speculative KD, arXiv 2410.11325)."""

    k: int = 25


class SwitchAtSpike(Behaviour, frozen=True):
    """The student writes until KL(p‖q) exceeds `factor` times its mean over the last `window` tokens, then the teacher
    (AdaSwitch, arXiv 2510.07842)."""

    factor: float = 3.0
    window: int = 8


class TeacherPrefix(Behaviour, frozen=True):
    """The teacher writes the first so many tokens (TrOPD, arXiv 2606.01249)."""

    tokens: Scalar = 32.0


class Coin(Behaviour, frozen=True):
    """Each answer by the student with this probability, by the teacher otherwise (GKD's λ, arXiv 2306.13649); 0: the teacher's
    own text. `greedy`: its likeliest (SeqKD, arXiv 1606.07947)."""

    student: Scalar = 0.5
    greedy: bool = False


class TeacherMembers(Behaviour, frozen=True):
    """The last `count` answers of each group are the teacher's (LUFFY, arXiv 2504.14945)."""

    count: int = 1


AnyBehaviour = (
    OnPolicy | Until | Mixture | GeometricBlend | Interleave | SwitchAtSpike | TeacherPrefix | Coin | TeacherMembers
)
