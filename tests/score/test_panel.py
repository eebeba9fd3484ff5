"""Who is asked about an answer: by the method's slots and the roles in the run file, or refused with both values."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from streamopd import config as configs
from streamopd.config import Teacher
from streamopd.errors import ConfigError
from streamopd.schemas import Array, Evidence, Group, Turn
from streamopd.score.panel import OWN_START, Panel
from streamopd.slots import (
    Advantage,
    Branch,
    Extrapolate,
    FullVocabulary,
    Likelihood,
    Method,
    Pool,
    ReferenceKL,
    Union,
    VocabularySlice,
)

PLAIN = Method(name="plain", summary="", branches=(Branch(),))
EXOPD = Method(name="exopd", summary="", branches=(Branch(target=Extrapolate()),))
LEASH = Method(name="leash", summary="", branches=(Branch(), Branch(loss=ReferenceKL())))
POOL = Method(name="pool", summary="", teachers=Pool())
GRPO = Method(name="grpo", summary="", branches=(Branch(loss=Advantage(), form="policy_gradient"),))
SFT = Method(name="sft", summary="", branches=(Branch(loss=Likelihood()),))
HIDDEN = Method(name="exact", summary="", branches=(Branch(support=FullVocabulary(by="hidden")),))

A, B, SERVER = Teacher(model="a"), Teacher(model="b"), Teacher(url="http://s:1")
REFERENCE = Teacher(model="r", role="reference")


def refusal(method: Method, **teachers: Teacher) -> str:
    with pytest.raises(ConfigError) as refused:
        Panel.of(method, teachers)
    return str(refused.value)


def test_a_prompt_is_scored_by_the_teacher_that_it_names() -> None:
    panel = Panel.of(PLAIN, {"b": B, "a": A})
    assert panel.members == ("a", "b")
    assert panel.asked("b") == ["b"]
    assert panel.problem("c") == "no teacher is called 'c'; there are: a, b"


@pytest.mark.parametrize("method", [EXOPD, LEASH])
def test_what_measures_from_a_reference_asks_the_configured_one_or_the_students_own_start(method: Method) -> None:
    own = Panel.of(method, {"a": A})
    assert (own.members, own.own_start) == (("a", OWN_START), True)
    named = Panel.of(method, {"a": A, "base": REFERENCE})
    assert (named.members, named.own_start) == (("a", "base"), False)
    assert named.asked("a") == ["a", "base"]
    assert not named.notes


def test_a_reference_that_nobody_needs_is_not_asked_and_that_is_said() -> None:
    panel = Panel.of(PLAIN, {"a": A, "base": REFERENCE})
    assert panel.members == ("a",)
    assert panel.notes == ('method = "plain" needs no reference: teachers.base is not asked.',)


@pytest.mark.parametrize("method", [PLAIN, EXOPD, POOL])
def test_a_prompt_that_names_a_reference_as_its_teacher_is_refused(method: Method) -> None:
    panel = Panel.of(method, {"a": A, "base": REFERENCE})
    with pytest.raises(ConfigError, match=r'In the data: teachers\.base is of role "reference" and teaches nobody'):
        panel.refuse_named({"a", "base"})
    panel.refuse_named({"a"})


def test_the_students_own_start_needs_its_id_for_itself() -> None:
    assert 'teachers.reference is of role "teacher". Set its role to "reference", or rename it.' in refusal(EXOPD, reference=A)


@pytest.mark.parametrize("method", [GRPO, SFT])
def test_a_method_that_listens_to_nobody_asks_nobody(method: Method) -> None:
    panel = Panel.of(method, {"a": A, "base": REFERENCE})
    assert panel.members == ()
    assert panel.asked("a") == panel.asked("anybody") == []
    assert panel.notes == (f'method = "{method.name}" asks no teacher: a, base of the run file scores nothing.',)


def test_a_pool_asks_all_servers_first_whoever_is_named() -> None:
    panel = Panel.of(POOL, {"b": B, "a": A, "s": SERVER})
    assert panel.asked("default") == ["s", "a", "b"]
    assert not panel.problem("default")


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((("a", 1.0), ("c", 1.0), ("b", 1.0)), "weighs a teacher 'c' in its pool; there are: a, b. Rename one of the two"),
        ((("a", 1.0),), "weighs a in its pool and not 'b'; there are: a, b. Give it a weight"),
    ],
)
def test_weights_that_do_not_fit_the_teachers_are_refused(weights: tuple[tuple[str, float], ...], words: str) -> None:
    assert words in refusal(Method(name="pool", summary="", teachers=Pool(weights=weights)), a=A, b=B)
    Panel.of(Method(name="pool", summary="", teachers=Pool(weights=(("b", 2.0), ("a", 1.0)))), {"a": A, "b": B})


def test_a_pool_reads_the_students_prompt() -> None:
    opened = msgspec.structs.replace(B, teacher_prompt=[Turn("system", "x")])
    assert "and teachers.b.teacher_prompt is set. Leave it out" in refusal(POOL, a=A, b=opened)


def test_a_server_is_not_asked_for_hidden_states() -> None:
    assert "teachers.s is reached by url, and servers send no hidden states" in refusal(HIDDEN, s=SERVER)
    Panel.of(HIDDEN, {"a": A})


def test_a_reference_is_asked_about_what_comes_with_the_item_and_no_more() -> None:
    sliced = Method(name="x", summary="", branches=(Branch(target=Extrapolate(), support=VocabularySlice((3, 4))),))
    panel = Panel.of(sliced, {"a": A})
    assert panel.request("a").slice_ids == (3, 4)
    asked = panel.request(OWN_START)
    assert (asked.teacher_k, asked.student_ids, asked.stop, asked.slice_ids) == (0, True, False, ())
    assert panel.width(student_k=5, stop_ids=2) == 5 + 1 + 2 + 2  # the student's, the sampled one, stops, the slice
    whole = Panel.of(Method(name="x", summary="", branches=(Branch(target=Extrapolate(), support=FullVocabulary()),)), {"a": A})
    assert whole.request(OWN_START) == whole.request("a")


def view(teacher_id: str, stop: bool = True, role: str = "teacher") -> Evidence:
    row = Array.of([-1.0], "float32")
    return Evidence(rollout_id="p0.0", role=role, teacher_id=teacher_id, logprobs=row, stop_logmass=row if stop else None)


def test_views_stand_in_the_order_of_ids_with_the_reference_last(make_group: Callable[..., Group]) -> None:
    panel = Panel.of(Method(name="x", summary="", teachers=Pool(), branches=EXOPD.branches), {"z": A, "s": SERVER, "a": REFERENCE})
    said = {"z": [[[view("z")], []]], "s": [[[view("s")], []]], "a": [[[view("a", role="reference")], []]]}
    ((views, none),) = panel.together([make_group(0, (1, 0))], said)
    assert [(v.teacher_id, v.role) for v in views] == [("s", "teacher"), ("z", "teacher"), ("a", "reference")]
    assert none == []


def test_stop_ids_are_one_cell_for_all_views_of_an_answer_or_for_none(make_group: Callable[..., Group]) -> None:
    panel = Panel.of(POOL, {"a": A, "b": B})
    ((views,),) = panel.together([make_group(0, (1,))], {"a": [[[view("a")]]], "b": [[[view("b", stop=False)]]]})
    assert [v.stop_logmass for v in views] == [None, None]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teachers.default.role=reference"], 'teachers.default: role is "reference", and no teacher is left. Add one'),
        (["teachers.x.model=m", "teachers.x.role=reference", "teachers.y.model=m", "teachers.y.role=reference"],
         "teachers.x and teachers.y are both of role"),
        (["teachers.x.model=m", "teachers.x.role=reference", 'teachers.x.teacher_prompt=[{role="system",content="x"}]'],
         "teachers.x.teacher_prompt is set, but teachers.x.role is"),
    ],
)
def test_roles_that_cannot_be_are_refused_with_the_run_file(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configs.load("quickstart", overrides)
    assert words in str(refused.value)


def test_the_reference_of_a_union_is_asked_with_its_sampled_token_as_the_union_says() -> None:
    bare = Union(sampled=False, stop=False)
    panel = Panel.of(Method(name="x", summary="", branches=(Branch(target=Extrapolate(), support=bare),)), {"a": A})
    assert not panel.request(OWN_START).sampled
