"""The settings of a method's primitives: plain values, no torch. Each stage has one function that turns them into behaviour."""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec
from msgspec import Struct


class Slot(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A setting of one primitive, named by its class."""


# ---------------------------------------------------------------- Support: which ids a divergence sees at a position
class FullVocabulary(Slot, frozen=True):
    """Every id. Exact, and only for small vocabularies: the teacher sends [G, V] float32."""


class Union(Slot, frozen=True):
    """student top-k ∪ teacher top-k ∪ {sampled} ∪ {stop ids}; what is left goes where `remainder` says.

    The tail bucket coarse-grains both sides by one partition (core.md I11); a divergence over it is a lower bound.
    """

    student_k: int = 16
    teacher_k: int = 16
    sampled: bool = True
    stop: bool = True
    remainder: Literal["tail", "renorm", "drop"] = "tail"


Support = FullVocabulary | Union


# ---------------------------------------------------------------- Divergence: how far apart, p the student, q the teacher
class ReverseKL(Slot, frozen=True):
    """KL(p‖q) = Σ p (log p − log q): mode-seeking."""


class ForwardKL(Slot, frozen=True):
    """KL(q‖p) = Σ q (log q − log p): mass-covering."""


class JSD(Slot, frozen=True):
    """Generalised Jensen–Shannon (GKD, arXiv 2306.13649): β KL(q‖m) + (1−β) KL(p‖m), m = β q + (1−β) p.

    The ends are the limits divided by β and 1 − β: 0 is forward KL, 1 is reverse KL.
    """

    beta: float = 0.5


Divergence = ReverseKL | ForwardKL | JSD


# ---------------------------------------------------------------- Age weight: a preference for fresh tokens
class NoAgeWeight(Slot, frozen=True):
    """Every token counts the same, whatever wrote it."""


class AgeDecay(Slot, frozen=True):
    """weight ∝ 0.5^(age / half_life_steps), divided by its mean over the step's tokens: relative, mean one."""

    half_life_steps: float = 4.0


AgeWeight = NoAgeWeight | AgeDecay


class EvidenceRequest(Struct, frozen=True):
    """What the teacher must return for a method; derived from its slots, never written by hand."""

    full: bool                # [G, V] float32
    teacher_k: int            # own top-k
    student_ids: bool         # log-probs on the student's own top-k ids
    sampled: bool
    stop: bool
    tail: bool = True         # what the support leaves out is one cell, so that fewer ids only loosen a bound


class Method(Struct, frozen=True, kw_only=True):
    """A method is a composition of slots, with its paper."""

    name: str
    summary: str
    paper: str = ""
    formula: str = ""
    evidence_level: Literal["reproduces", "inspired by", "default"] = "inspired by"
    support: Support = Union()
    divergence: Divergence = ReverseKL()
    age_weight: AgeWeight = NoAgeWeight()

    @property
    def digest(self) -> str:
        """Of the settings that change what is computed, not of the words."""
        body = msgspec.json.encode([self.support, self.divergence, self.age_weight])
        return hashlib.sha256(body).hexdigest()[:16]

    @property
    def student_k(self) -> int:
        """How many of the student's own ids a generator must record a token; 0: none."""
        return self.support.student_k if isinstance(self.support, Union) else 0

    @property
    def evidence(self) -> EvidenceRequest:
        if isinstance(self.support, FullVocabulary):
            return EvidenceRequest(full=True, teacher_k=0, student_ids=False, sampled=True, stop=False)
        union = self.support
        return EvidenceRequest(
            full=False, teacher_k=union.teacher_k, student_ids=union.student_k > 0, sampled=union.sampled, stop=union.stop,
            tail=union.remainder == "tail",
        )
