"""Support: which ids a divergence sees at a position. What is left goes where `remainder` says.

tail    one cell more on both sides: the same partition, so a lower bound of the divergence (core.md I11)
renorm  the ids share all mass, on both sides: what lies outside is not seen at all
drop    the ids keep their own mass: biased (arXiv 2605.11182)
"""

from __future__ import annotations

from typing import Literal

from .slot import Slot

Remainder = Literal["tail", "renorm", "drop"]


class FullVocabulary(Slot, frozen=True):
    """Every id: exact. "logprobs": the teacher sends [G, V] float32, for small vocabularies; "hidden": it sends its last
    hidden states [G, d] float16, and the learner, which must have the teacher's folder, its output head."""

    by: Literal["logprobs", "hidden"] = "logprobs"


class Union(Slot, frozen=True):
    """student top-k ∪ teacher top-k ∪ {sampled} ∪ {stop ids}: all that the evidence carries."""

    student_k: int = 16
    teacher_k: int = 16
    sampled: bool = True
    stop: bool = True
    remainder: Remainder = "tail"


class TeacherTop(Slot, frozen=True):
    """The teacher's k likeliest ids."""

    k: int = 16
    remainder: Remainder = "tail"


class StudentTop(Slot, frozen=True):
    """The live student's k likeliest ids, among those that the teacher was asked about."""

    k: int = 16
    remainder: Remainder = "tail"


class Intersection(Slot, frozen=True):
    """What is in both top-k."""

    k: int = 16
    remainder: Remainder = "tail"


class VocabularySlice(Slot, frozen=True):
    """These ids and no other."""

    ids: tuple[int, ...]
    remainder: Remainder = "drop"


Support = FullVocabulary | Union | TeacherTop | StudentTop | Intersection | VocabularySlice


def most_ids(support: Support) -> float:
    """How many ids a support can hold at a token."""
    if isinstance(support, FullVocabulary):
        return float("inf")
    if isinstance(support, Union):
        return float("inf") if support.stop else support.student_k + support.teacher_k + support.sampled
    return len(support.ids) if isinstance(support, VocabularySlice) else support.k
