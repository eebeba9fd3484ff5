"""A method: its paper, and the composition of slots that it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import ClassVar, Literal

import msgspec
from msgspec import Struct

from .age import AgeWeight, NoAgeWeight
from .behaviour import AnyBehaviour, Behaviour, Members, OnPolicy
from .correction import Correction, NoCorrection
from .loss import (
    Advantage,
    ArgmaxCrossEntropy,
    Entropy,
    Form,
    GoldOrGuess,
    Likelihood,
    ListwiseRanking,
    Loss,
    Power,
    ReferenceKL,
    ReverseKL,
)
from .plateau import Plateau
from .pool import Routed, Teachers
from .route import Always, Correct, Incorrect, When, WrittenBy
from .select import Everything, Select
from .shape import Baseline, MarginShift, OutcomeGate, Shape
from .slot import Scalar, Slot, inside, settled
from .support import FullVocabulary, Intersection, StudentTop, Support, TeacherTop, Union, VocabularySlice, most_ids
from .target import Extrapolate, Target, Teacher
from .weight import (
    ChangePoint,
    GroupSoftmax,
    PassRate,
    Teachability,
    TeacherAccepts,
    Weight,
)

AGREEMENT_K = 16  # of the student's ids, where a fact speaks of its top k and the slot does not say which


# what speaks of the student's own candidates: without their ids it would be something else, not a looser bound
OF_CANDIDATES = (Baseline, ChangePoint, ListwiseRanking, Teachability, GoldOrGuess)
# what looks at the teacher's log-prob of the written token, whatever the loss


class EvidenceRequest(Struct, frozen=True):
    """What a teacher must return for a method; derived from its slots, never written by hand."""

    full: bool                # [G, V] float32
    teacher_k: int            # own top-k
    student_ids: bool         # log-probs on the student's own top-k ids
    sampled: bool
    stop: bool
    tail: bool = True         # what the support leaves out is one cell, so that fewer ids only loosen a bound
    slice_ids: tuple[int, ...] = ()  # log-probs on these ids at every token
    hidden: bool = False      # last hidden states [G, d]


class Branch(Slot, frozen=True, kw_only=True):
    """One term of the loss: what the tokens that `when` lets in are told, and how much it counts."""

    when: When = Always()
    target: Target = Teacher()
    support: Support = Union()
    loss: Loss = ReverseKL()
    form: Form = "direct"
    shape: tuple[Shape, ...] = ()
    weight: tuple[Weight, ...] = ()
    correction: Correction | None = None  # of a policy gradient; None = the method's
    scale: Scalar = 1.0

    def __post_init__(self) -> None:
        pg_only, direct_only = (Power, Advantage), (Entropy, ReferenceKL, ListwiseRanking, ArgmaxCrossEntropy, GoldOrGuess)
        name = type(self.loss).__name__
        if isinstance(self.loss, pg_only) and self.form != "policy_gradient":
            raise ValueError(f'{name} is a coefficient of the written token: its form is "policy_gradient", not "{self.form}".')
        if isinstance(self.loss, direct_only) and self.form != "direct":
            raise ValueError(f'{name} sums over candidates: its form is "direct", not "{self.form}".')
        if self.shape and self.form != "policy_gradient":
            raise ValueError(f'A shape bends coefficients of form "policy_gradient"; this branch is "{self.form}".')
        if self.form == "policy_gradient" and not isinstance(self.target, Teacher) and not isinstance(self.loss, ReverseKL):
            raise ValueError(
                f"At one token a target of form {type(self.target).__name__} is known up to a constant, which only ReverseKL does not "
                f'mind; this policy gradient is of {name}. Use form "direct", or ReverseKL.'
            )
        if most_ids(self.support) == 1 and not isinstance(self.support, FullVocabulary) and self.support.remainder == "renorm":
            raise ValueError("One id that takes all mass on both sides says nothing: its divergence is 0. Raise k, or keep the tail.")


class Stage(Slot, frozen=True, kw_only=True):
    """What a method is until progress `until` of the run, or until a plateau before."""

    until: float
    branches: tuple[Branch, ...]
    behaviour: AnyBehaviour = OnPolicy()
    plateau: Plateau | None = None


class Method(Struct, frozen=True, kw_only=True):
    """A method is a composition of slots, with its paper.

    `routing`: "additive" adds all branches, "exclusive" gives a token to the first that lets it in. `stages` come in turn and
    replace branches and behaviour; `at` says what holds at a moment of the run.
    """

    name: str
    summary: str
    paper: str = ""
    formula: str = ""
    evidence_level: Literal["reproduces", "inspired by", "default"] = "inspired by"
    note: str = ""                                # why "inspired by": what is not the paper's
    alias_of: str = ""                            # the method whose composition this is, under another name
    suggests: tuple[tuple[str, str], ...] = ()    # keys of the run file and the paper's values, for people
    behaviour: AnyBehaviour = OnPolicy()
    teachers: Teachers = Routed()
    select: Select = Everything()
    branches: tuple[Branch, ...] = (Branch(),)
    routing: Literal["additive", "exclusive"] = "additive"
    stages: tuple[Stage, ...] = ()
    correction: Correction = NoCorrection()
    reduce: Literal["token_mean", "answer_mean"] = "token_mean"
    age_weight: AgeWeight = NoAgeWeight()

    def __post_init__(self) -> None:
        self._refuse_what_is_no_setting()
        for branches in [self.branches, *(stage.branches for stage in self.stages)]:
            for kind in (Advantage, Baseline, ChangePoint):  # each is one column of a step
                found = {slot for branch in branches for slot in inside(branch) if isinstance(slot, kind)}
                if len(found) > 1:
                    raise ValueError(f"{self.name}: two branches have a {kind.__name__} each, and they differ: {found}. Use one of them.")
        if self.stages and self.stages[-1].plateau:
            raise ValueError(f"{self.name}: the last stage ends on a plateau, and no stage comes after it: {self.stages[-1].plateau}.")
        if WrittenBy("gold") in self.slots and not self.needs_gold:
            raise ValueError(
                f'{self.name}: a branch speaks to WrittenBy("gold"), and no behaviour lets the dataset write: {self.behaviours}. '
                'Use Coin(author="gold") or Members(author="gold").'
            )

    COMPUTED: ClassVar = (
        "behaviour", "teachers", "select", "branches", "routing", "stages", "correction", "reduce", "age_weight",
    )

    def _refuse_what_is_no_setting(self) -> None:
        """Structs take any value for any field; a word nobody knows would pass for the last one that somebody does."""
        for name, kind in SETTINGS.items():
            try:
                msgspec.convert(msgspec.to_builtins(getattr(self, name)), kind)
            except (msgspec.ValidationError, TypeError) as error:
                raise ValueError(f"method {self.name!r}: {name} is not what it can be: {error}") from None

    @property
    def digest(self) -> str:
        """Of the settings that change what is computed, not of the words."""
        body = msgspec.json.encode([getattr(self, name) for name in self.COMPUTED])
        return hashlib.sha256(body).hexdigest()[:16]

    def stage_at(self, progress: float, least: int = 0) -> int:
        """Which of the stages holds, when those before number `least` have ended."""
        due = next((number for number, stage in enumerate(self.stages) if progress < stage.until), len(self.stages) - 1)
        return max(least, due)

    def at(self, progress: float, least: int = 0) -> Method:
        """The method at a moment of the run: its stage's branches and behaviour, every moving number a plain one.

        Stages before number `least` have ended early.
        """
        stage = self.stages[self.stage_at(progress, least)] if self.stages else None
        branches, behaviour = (stage.branches, stage.behaviour) if stage else (self.branches, self.behaviour)
        return msgspec.structs.replace(
            self, stages=(), branches=tuple(settled(branch, progress) for branch in branches), behaviour=settled(behaviour, progress)
        )

    # ---------------------------------------------------------------- what it needs, over all its stages
    @property
    def all_branches(self) -> tuple[Branch, ...]:
        return tuple(branch for stage in self.stages for branch in stage.branches) or self.branches

    @property
    def slots(self) -> Iterator[Slot]:
        """Every slot in it."""
        for branch in self.all_branches:
            yield from inside(branch)
        yield self.correction

    @property
    def behaviours(self) -> tuple[Behaviour, ...]:
        return tuple(stage.behaviour for stage in self.stages) or (self.behaviour,)

    @property
    def surveys(self) -> bool:
        """Whether a step must be seen whole before its first gradient."""
        return any(slot.surveys for slot in self.slots)

    @property
    def facts(self) -> frozenset[str]:
        """What the learner must know of a token beside the log-probs of what was written."""
        return frozenset(fact for slot in self.slots for fact in slot.facts)

    @property
    def exact(self) -> bool:
        """Whether the teacher's whole distribution is asked for."""
        return any(isinstance(slot, FullVocabulary) for slot in self.slots)

    @property
    def student_k(self) -> int:
        """How many of the student's own ids a generator must record a token; 0: none."""
        return 0 if self.exact else max((_student_k(slot) for slot in self.slots), default=0)

    @property
    def evidence(self) -> EvidenceRequest:
        if self.exact:
            by_hidden = any(isinstance(slot, FullVocabulary) and slot.by == "hidden" for slot in self.slots)
            return EvidenceRequest(
                full=not by_hidden, teacher_k=0, student_ids=False, sampled=True, stop=False, hidden=by_hidden
            )
        supports = [branch.support for branch in self.all_branches if summed_over(branch)]
        unions = [support for support in supports if isinstance(support, Union)]
        slices = {i for support in supports if isinstance(support, VocabularySlice) for i in support.ids}
        return EvidenceRequest(
            full=False,
            teacher_k=max((_teacher_k(slot) for slot in self.slots), default=0),
            student_ids=self.student_k > 0,
            sampled=len(unions) < len(supports) or not supports or any(union.sampled for union in unions),
            stop=len(unions) < len(supports) or not supports or any(union.stop for union in unions),
            tail=all(isinstance(support, Union) and support.remainder == "tail" for support in supports)
            and not any(isinstance(slot, OF_CANDIDATES) for slot in self.slots),
            slice_ids=tuple(sorted(slices)),
        )

    @property
    def needs_reference(self) -> bool:
        return any(isinstance(slot, Extrapolate | ReferenceKL) for slot in self.slots)

    @property
    def needs_grades(self) -> bool:
        graded = (Advantage, Correct, Incorrect, OutcomeGate, MarginShift, PassRate)
        return any(isinstance(slot, graded) for slot in self.slots) or not isinstance(self.select, Everything)

    @property
    def least_group(self) -> int:
        """Answers to one prompt, at least."""
        members = [b.count + 1 for b in self.behaviours if isinstance(b, Members)]
        compared = any(isinstance(slot, Advantage | MarginShift | PassRate | GroupSoftmax) for slot in self.slots)
        return max([*members, 2 if compared or not isinstance(self.select, Everything) else 1])

    @property
    def needs_writing_teacher(self) -> bool:
        """Whether a teacher must sit in the generator."""
        return any(behaviour.author == "teacher" for behaviour in self.behaviours)

    @property
    def needs_gold(self) -> bool:
        """Whether the dataset must have an answer to each prompt."""
        return any(behaviour.author == "gold" for behaviour in self.behaviours)

    @property
    def needs_teacher(self) -> bool:
        """Whether evidence is used at all."""
        told = [branch.loss for branch in self.all_branches]
        return not all(isinstance(loss, Advantage | Likelihood | Entropy) for loss in told) or bool(self.facts - {"entropy"})


def summed_over(branch: Branch) -> bool:
    """Whether the branch's support is looked at: a policy gradient speaks of the written token alone."""
    return branch.form != "policy_gradient" and not isinstance(branch.loss, Likelihood | Entropy)


def _student_k(slot: Slot) -> int:
    if isinstance(slot, Branch):
        support = slot.support
        k = support.student_k if isinstance(support, Union) else support.k if isinstance(support, StudentTop | Intersection) else 0
        k = max(k, slot.loss.k) if isinstance(slot.loss, ListwiseRanking) else k
        return k if summed_over(slot) else 0
    if isinstance(slot, Baseline | ChangePoint):
        return slot.k
    return AGREEMENT_K if isinstance(slot, Teachability) else 0


def _teacher_k(slot: Slot) -> int:
    if isinstance(slot, TeacherAccepts):
        return slot.k
    if not isinstance(slot, Branch) or not summed_over(slot):
        return 0
    support = slot.support
    k = support.teacher_k if isinstance(support, Union) else support.k if isinstance(support, TeacherTop | Intersection) else 0
    return max(k, 1 if isinstance(slot.loss, ArgmaxCrossEntropy) else 0)


SETTINGS: dict[str, object] = {
    "behaviour": AnyBehaviour, "teachers": Teachers, "select": Select, "branches": tuple[Branch, ...], "stages": tuple[Stage, ...],
    "routing": Literal["additive", "exclusive"], "correction": Correction, "reduce": Literal["token_mean", "answer_mean"],
    "age_weight": AgeWeight,
}
