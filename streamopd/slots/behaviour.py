"""Behaviour: who writes an answer, token by token. A teacher that writes sits inside the generator.

p the student's kernel, q the teacher's. `logprobs` of a rollout are those of the kernel that really sampled, and its
`authors` say who wrote which tokens. Gold is the dataset's own answer: nobody sampled it, and its log-probs are p's.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from .slot import Scalar, Slot


class Behaviour(Slot, frozen=True):
    """Base of the settings below."""

    alone: ClassVar[bool] = False  # whether nobody but the student writes

    @property
    def author(self) -> Literal["", "teacher", "gold"]:
        """Who writes beside the student; "": nobody."""
        return "" if self.alone else "teacher"


class OnPolicy(Behaviour, frozen=True):
    """The student, alone."""

    alone: ClassVar = True


class Until(Behaviour, frozen=True):
    """The student, for so many tokens (ESR, arXiv 2605.27028)."""

    alone: ClassVar = True
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
    """Each answer by the student with this probability, otherwise by the teacher, or "gold": the dataset (GKD's λ, arXiv
    2306.13649); 0: never by the student. `greedy`: the teacher's likeliest (SeqKD, arXiv 1606.07947)."""

    student: Scalar = 0.5
    greedy: bool = False
    author: Literal["teacher", "gold"] = "teacher"

    def __post_init__(self) -> None:
        if self.greedy and self.author == "gold":
            raise ValueError(f"A dataset's answer is not drawn, greedily or otherwise: {self}. Leave `greedy` out.")


class Members(Behaviour, frozen=True):
    """The last `count` answers of each group are the teacher's (LUFFY, arXiv 2504.14945), or the last one is "gold": the
    dataset's (Stable-OPD, arXiv 2604.08527)."""

    author: Literal["teacher", "gold"] = "teacher"
    count: int = 1

    def __post_init__(self) -> None:
        if self.count > 1 and self.author == "gold":
            raise ValueError(f"A dataset has one answer to a prompt, and `count` is {self.count}: {self}. Set it to 1.")


AnyBehaviour = OnPolicy | Until | Mixture | GeometricBlend | Interleave | SwitchAtSpike | TeacherPrefix | Coin | Members
