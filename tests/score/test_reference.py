"""A reference speaks of the very ids that the teacher spoke of, in the student's own context, and says what its model says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from streamopd.assets import resolve
from streamopd.errors import TeacherError
from streamopd.schemas import Evidence, Finish, Group
from streamopd.score.check import check_evidence, check_same_ids
from streamopd.score.http import HttpTeacher
from streamopd.score.item import Views, as_reference
from streamopd.score.local import LocalTeacher
from streamopd.score.probe import probe, student_of
from streamopd.slots import EvidenceRequest
from tests.score.servers import MODEL, honest, served
from tests.score.test_local import FULL, HIDDEN, SAMPLED, UNION, open_teacher, plain_logp

GroupMaker = Callable[..., Group]
STUDENT = "asset:quickstart-student"
STOPS = (2,)
SLICED = replace(UNION, slice_ids=(3, 5, 17))
BARE = replace(SAMPLED, sampled=False)


@pytest.fixture(scope="module")
def start() -> LocalTeacher:
    """The student's initial weights."""
    return LocalTeacher(resolve(STUDENT), "reference", "float32", STOPS, 256)


@pytest.fixture(scope="module")
def teacher() -> LocalTeacher:
    return LocalTeacher(resolve(MODEL), "default", "float32", STOPS, 256)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(honest().app) as address:
        yield address


@pytest.fixture
def groups(make_group: GroupMaker) -> list[Group]:
    """With contexts that the teacher alone sees, and an answer that failed."""
    failed = make_group(7, (4,), vocab=19, finish=Finish.ERROR)
    return [*(make_group(seq, (6, 0, 3), vocab=19, teacher_prompt=4 * (seq % 2)) for seq in range(4)), failed]


def outside(url: str) -> HttpTeacher:
    teacher = HttpTeacher("default", [url], STOPS, 64, timeout_s=5.0)
    teacher.meet()
    return teacher


def pairs(groups: list[Group], one: list[Views], other: list[Views]) -> Iterator[tuple[Group, int, Evidence, Evidence]]:
    """(group, rollout, teacher's view, reference's view) of every answer that has one."""
    for group, mine, theirs in zip(groups, one, other, strict=True):
        for r, (teachers, references) in enumerate(zip(mine, theirs, strict=True)):
            assert len(teachers) == len(references) == (1 if len(group.rollouts[r].completion_ids) and group is not groups[-1] else 0)
            if teachers:
                yield group, r, teachers[0], references[0]


@pytest.mark.parametrize("request_", [UNION, SLICED, SAMPLED, BARE], ids=["union", "slice", "sampled", "nothing"])
@pytest.mark.parametrize("far", [False, True], ids=["local", "http"])
def test_its_rows_hold_the_teachers_ids_and_its_own_log_probs(
    groups: list[Group], teacher: LocalTeacher, start: LocalTeacher, url: str, request_: EvidenceRequest, far: bool
) -> None:
    told = (outside(url) if far else teacher).score(groups, request_)
    said = start.score(groups, as_reference(request_), told)
    for group, mine, theirs in zip(groups, said, told, strict=True):
        check_evidence(group, mine, 19)
        check_same_ids(mine, theirs)
    for group, r, view, own in pairs(groups, told, said):
        assert (view.role, own.role, own.teacher_id) == ("teacher", "reference", "reference")
        logp_GV = plain_logp(resolve(STUDENT), replace_context(group), group.rollouts[r])
        completion_G = group.rollouts[r].completion_ids.numpy()
        np.testing.assert_allclose(own.logprobs.numpy(), logp_GV[np.arange(len(completion_G)), completion_G], atol=1e-4)
        if own.support is not None:
            ids = own.support.ids.numpy()
            rows = np.nonzero(ids >= 0)[0]
            np.testing.assert_allclose(own.support.logprobs.numpy()[ids >= 0], logp_GV[rows, ids[ids >= 0]], rtol=2e-3, atol=1e-3)
            masses = [np.exp(logp[row[row >= 0]]).sum() for logp, row in zip(logp_GV, ids, strict=True)]
            np.testing.assert_allclose(own.mass.numpy(), masses, atol=1e-4)


def replace_context(group: Group) -> Group:
    """Without the teacher's own context."""
    return replace(group, prompt=replace(group.prompt, teacher_prompt_ids=None))


def test_its_context_is_the_students_own(groups: list[Group], teacher: LocalTeacher, start: LocalTeacher) -> None:
    told = teacher.score(groups, UNION)
    said = start.score(groups, as_reference(UNION), told)
    same = [view.context_digest == own.context_digest for _, _, view, own in pairs(groups, told, said)]
    assert same == [group.prompt.teacher_prompt_ids is None for group in groups[:4] for _ in range(2)]


def test_a_whole_view_or_hidden_states_are_asked_of_both_alike(groups: list[Group], teacher: LocalTeacher, start: LocalTeacher) -> None:
    for request in (FULL, HIDDEN):
        told = teacher.score(groups, request)
        said = start.score(groups, as_reference(request), told)
        for group, r, view, own in pairs(groups, told, said):
            check_same_ids([[own]], [[view]])
            assert (own.support is None, own.hidden is None) == (view.support is None, view.hidden is None)
            if own.support is not None:
                logp_GV = plain_logp(resolve(STUDENT), replace_context(group), group.rollouts[r])
                np.testing.assert_allclose(own.support.logprobs.numpy(), logp_GV, atol=1e-4)


def test_a_server_as_the_reference_says_what_a_model_here_says(groups: list[Group], start: LocalTeacher, url: str) -> None:
    told = start.score(groups, SLICED)
    here = LocalTeacher(resolve(MODEL), "base", "float32", STOPS, 256).score(groups, as_reference(SLICED), told)
    there = outside(url).score(groups, as_reference(SLICED), told)
    for _, _, one, other in pairs(groups, here, there):
        assert one.support.ids.numpy().tolist() == other.support.ids.numpy().tolist()
        np.testing.assert_allclose(one.support.logprobs.numpy(), other.support.logprobs.numpy(), atol=2e-2)
        np.testing.assert_allclose(one.logprobs.numpy(), other.logprobs.numpy(), atol=1e-4)
        assert other.role == "reference"


def test_a_slice_is_scored_by_a_server_as_it_is_here(groups: list[Group], teacher: LocalTeacher, url: str) -> None:
    for _, _, one, other in pairs(groups, teacher.score(groups, SLICED), outside(url).score(groups, SLICED)):
        assert one.support.ids.numpy().tolist() == other.support.ids.numpy().tolist()
        np.testing.assert_allclose(one.support.logprobs.numpy(), other.support.logprobs.numpy(), atol=2e-2)


def sentence(request: EvidenceRequest, role: str = "teacher", **info: object) -> str:
    with served(honest(**info).app) as address, pytest.raises(TeacherError) as refused:  # type: ignore[arg-type]
        examine(address, request, role)
    return str(refused.value)


def examine(address: str, request: EvidenceRequest, role: str) -> list[str]:
    told: list[str] = []
    student = student_of(resolve(STUDENT), STOPS, 40, 12, [np.array([1, 4, 13, 5, 15], np.int32)])
    probe(HttpTeacher("base", [address], STOPS, 64, timeout_s=5.0), student, request, told.append, wait_s=0.0, role=role)
    return told


def test_what_a_server_cannot_tell_and_nothing_can_stand_in_for_is_refused_at_the_start() -> None:
    assert "teachers.base is reached by url, and servers send no hidden states" in sentence(HIDDEN)
    assert "this method asks about a slice of 3 ids at every token" in sentence(SLICED, scores_ids=False)
    assert "VocabularySlice names id 19, and teacher 'base' has 19 ids" in sentence(replace(SLICED, slice_ids=(19,)))
    told = sentence(as_reference(UNION), "reference", scores_ids=False)
    assert "a reference is asked about the very ids that the teacher told" in told
    assert "leave teachers.base out: the student's initial weights take its place" in told


def test_a_server_that_scores_given_ids_passes_as_a_reference(url: str) -> None:
    told = "\n".join(examine(url, as_reference(UNION), "reference"))
    assert "own ids a token: any number" in told
    assert "tokens/s" in told


def test_a_reference_needs_no_ids_of_the_students(folder: Path, make_group: GroupMaker) -> None:
    group, asked = make_group(0, (5,), student_k=0), replace(UNION, student_ids=False)
    told = open_teacher(folder).score([group], asked)
    said = open_teacher(folder).score([group], as_reference(asked), told)
    check_same_ids(said[0], told[0])
