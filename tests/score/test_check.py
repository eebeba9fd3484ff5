"""Evidence that cannot be true is refused with the sentence that says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from streamopd.errors import GarbageRecord
from streamopd.schemas import Array, Evidence, Group, TopK
from streamopd.score.check import check_evidence, check_same_ids
from streamopd.score.local import LocalTeacher
from streamopd.slots import EvidenceRequest

UNION = EvidenceRequest(full=False, teacher_k=5, student_ids=True, sampled=True, stop=True)
FULL = EvidenceRequest(full=True, teacher_k=0, student_ids=False, sampled=True, stop=False)
Scene = tuple[Group, Evidence, Evidence]


@pytest.fixture(scope="module")
def scene(folder: Path) -> Callable[[Group], Scene]:
    teacher = LocalTeacher(folder, "default", "float32", (2, 7), 512)

    def score(group: Group) -> Scene:
        return group, *(teacher.score([group], request)[0][0][0] for request in (UNION, FULL))

    return score


def test_what_a_local_teacher_says_passes(scene: Callable[[Group], Scene], make_group: Callable[..., Group]) -> None:
    group, union, full = scene(make_group(0, (6,)))
    check_evidence(group, [[union]], 300)
    check_evidence(group, [[full]], 300)


def edit(array: Array, at: tuple[int, ...], value: float) -> Array:
    values = array.numpy().copy()
    values[at] = value
    return Array.of(values, array.dtype)


def support_with(view: Evidence, **values: Any) -> dict[str, Any]:
    assert view.support is not None
    return {"support": msgspec.structs.replace(view.support, **values)}


LIES: list[tuple[str, Callable[[Evidence], dict[str, Any]]]] = [
    ("is of p9.0 with 6 tokens", lambda view: {"rollout_id": "p9.0"}),
    ("mass is 1.5 at token 2", lambda view: {"mass": edit(view.mass, (2,), 1.5)}),
    ("mass is nan at token 0", lambda view: {"mass": edit(view.mass, (0,), np.nan)}),
    ("entropy is 9 at token 1", lambda view: {"entropy": edit(view.entropy, (1,), 9)}),
    ("stop_logmass is 0.5 at token 3", lambda view: {"stop_logmass": edit(view.stop_logmass, (3,), 0.5)}),
    ("vocabulary has 300", lambda view: support_with(view, ids=edit(view.support.ids, (0, 0), 300))),
    ("names one id twice", lambda view: support_with(view, ids=edit(view.support.ids, (0, 0), view.support.ids.numpy()[0, 1]))),
    ("has log-prob -inf", lambda view: support_with(view, logprobs=edit(view.support.logprobs, (0, 0), -np.inf))),
    ("the support sums to", lambda view: {"mass": edit(view.mass, (1,), 0.5 * view.mass.numpy()[1] + 0.4)}),
]


@pytest.mark.parametrize(("sentence", "lie"), LIES, ids=[sentence for sentence, _ in LIES])
def test_a_view_that_cannot_be_true_is_refused(
    scene: Callable[[Group], Scene], make_group: Callable[..., Group], sentence: str, lie: Callable[[Evidence], dict[str, Any]]
) -> None:
    group, union, _ = scene(make_group(0, (6,)))
    with pytest.raises(GarbageRecord, match=sentence):
        check_evidence(group, [[msgspec.structs.replace(union, **lie(union))]], 300)


def test_a_whole_vocabulary_of_another_size_or_sum_is_refused(
    scene: Callable[[Group], Scene], make_group: Callable[..., Group]
) -> None:
    group, _, full = scene(make_group(0, (6,)))
    with pytest.raises(GarbageRecord, match="300 columns for a vocabulary of 301"):
        check_evidence(group, [[full]], 301)
    halved = TopK(None, Array.of(full.support.logprobs.numpy() - np.log(2), "float32"))
    with pytest.raises(GarbageRecord, match=r"sums to 0\.5000"):
        check_evidence(group, [[msgspec.structs.replace(full, support=halved)]], 300)


@pytest.mark.parametrize(
    ("hidden", "sentence"),
    [
        (Array.of(np.ones((6, 4)), "float32"), r"hidden states are float32\[6, 4\]"),
        (Array.of(np.ones(6), "float16"), r"hidden states are float16\[6\]"),
        (Array.of(np.where(np.arange(6)[:, None] == 3, np.inf, np.ones((6, 4))), "float16"), "the hidden state at token 3 is not finite"),
    ],
)
def test_hidden_states_of_another_kind_or_beyond_float16_are_refused(
    scene: Callable[[Group], Scene], make_group: Callable[..., Group], hidden: Array, sentence: str
) -> None:
    group, union, _ = scene(make_group(0, (6,)))
    with pytest.raises(GarbageRecord, match=sentence):
        check_evidence(group, [[msgspec.structs.replace(union, hidden=hidden)]], 300)


def test_a_reference_of_other_ids_than_the_teachers_is_refused(
    scene: Callable[[Group], Scene], make_group: Callable[..., Group]
) -> None:
    _, union, full = scene(make_group(0, (6,)))
    other = msgspec.structs.replace(union, role="reference", **support_with(union, ids=edit(union.support.ids, (4, 0), 299)))
    check_same_ids([[union], []], [[union], []])
    for wrong in (other, msgspec.structs.replace(full, role="reference")):
        with pytest.raises(GarbageRecord, match="both must hold the same ids at every token"):
            check_same_ids([[wrong]], [[union]])


def test_views_for_another_number_of_answers_are_refused(
    scene: Callable[[Group], Scene], make_group: Callable[..., Group]
) -> None:
    group, union, _ = scene(make_group(0, (6,)))
    with pytest.raises(GarbageRecord, match="1 rollouts but views for 2"):
        check_evidence(group, [[union], []], 300)
