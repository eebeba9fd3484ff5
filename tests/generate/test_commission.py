"""What a prompt asks of a generator: whose answer each is, how long, and which runs are refused before they start."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from streamopd.config import Teacher
from streamopd.errors import ConfigError
from streamopd.generate.commission import commission, of_answer, writing_teacher
from streamopd.generate.draws import COIN, REPLACEMENTS, TOKENS, uniforms
from streamopd.generate.engine import Request
from streamopd.schemas import Array, Prompt
from streamopd.slots import (
    Behaviour,
    Coin,
    GeometricBlend,
    Interleave,
    Linear,
    Members,
    Method,
    Mixture,
    OnPolicy,
    Stage,
    SwitchAtSpike,
    TeacherPrefix,
    Until,
)

WHOLE = Coin(student=0.0)


GOLD_IDS = [8, 9, 2]


def prompt(context: list[int] | None = None, gold: list[int] | None = None) -> Prompt:
    ids, other, own = (None if some is None else Array.of(some, "int32") for some in ([3, 4], context, gold))
    assert ids is not None
    return Prompt(id="p5", run="r", method="m", born_s=0.0, seq=5, prompt_ids=ids, teacher_prompt_ids=other, gold_ids=own)


def asked(behaviour: Behaviour, count: int = 4, max_new: int = 60, gold: list[int] | None = None) -> list[Request]:
    return commission(prompt(gold=gold), behaviour, count=count, run_seed=9, max_new=max_new)


def test_a_group_is_asked_for_answer_by_answer() -> None:
    requests = commission(prompt([7, 3, 4]), OnPolicy(), count=2, run_seed=9, max_new=60)
    assert [(r.id, r.seed, r.max_new) for r in requests] == [("p5.0", (9, 5, 0), 60), ("p5.1", (9, 5, 1), 60)]
    assert requests[0].prompt_ids.tolist() == [3, 4]
    assert requests[0].context_ids.tolist() == [7, 3, 4]
    assert asked(OnPolicy())[0].context_ids.tolist() == [3, 4]


@pytest.mark.parametrize(("tokens", "expected"), [(100.0, 60), (12.4, 12), (0.0, 1)])
def test_a_horizon_lowers_the_limit_and_asks_no_teacher(tokens: float, expected: int) -> None:
    assert {(r.max_new, r.behaviour) for r in asked(Until(tokens=tokens))} == {(expected, OnPolicy())}


def test_the_last_members_of_a_group_are_the_teachers() -> None:
    assert [r.behaviour for r in asked(Members(count=1))] == [OnPolicy()] * 3 + [WHOLE]
    assert [r.behaviour for r in asked(Members(count=3))] == [OnPolicy()] + [WHOLE] * 3


def test_the_last_member_of_a_group_is_the_datasets_as_long_as_it_is() -> None:
    found = asked(Members("gold"), gold=GOLD_IDS)
    assert [(r.behaviour, r.max_new, r.gold_ids is None) for r in found[:3]] == [(OnPolicy(), 60, True)] * 3
    last = found[3]
    assert (last.behaviour, last.max_new, last.gold_ids.tolist()) == (Coin(student=0.0, author="gold"), 3, GOLD_IDS)


def test_a_gold_coin_falls_as_a_teachers_does_and_gives_text_to_the_datasets_side_alone() -> None:
    gold, taught = (asked(Coin(student=0.5, author=author), count=200, gold=GOLD_IDS) for author in ("gold", "teacher"))
    assert [r.behaviour == OnPolicy() for r in gold] == [r.behaviour == OnPolicy() for r in taught]
    assert {(type(r.behaviour), r.gold_ids is None) for r in gold} == {(OnPolicy, True), (Coin, False)}
    assert all(r.gold_ids is None for r in taught)


def test_no_engine_is_asked_for_gold_without_its_text() -> None:
    with pytest.raises(AssertionError, match="gold"):
        asked(Coin(student=0.0, author="gold"))


@pytest.mark.parametrize(("student", "expected"), [(1.0, OnPolicy()), (0.0, Coin(student=0.0, greedy=True))])
def test_a_coin_with_one_side_always_falls_on_it(student: float, expected: Behaviour) -> None:
    assert {r.behaviour for r in asked(Coin(student=student, greedy=True), count=50)} == {expected}


def test_a_coin_falls_as_often_as_it_should_and_the_same_way_again() -> None:
    thrown = [of_answer(Coin(student=0.3), (1, seq, 0), 0, 1) for seq in range(4000)]
    assert thrown == [of_answer(Coin(student=0.3), (1, seq, 0), 0, 1) for seq in range(4000)]
    share = sum(behaviour == OnPolicy() for behaviour in thrown) / 4000
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)


def test_draws_for_one_purpose_say_nothing_of_those_for_another() -> None:
    drawn = np.stack([uniforms((1, 2, 3), 4000, purpose) for purpose in (TOKENS, REPLACEMENTS, COIN)])
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.07
    assert (drawn[0] == uniforms((1, 2, 3), 4000)).all()


@pytest.mark.parametrize("still", [Mixture(alpha=0.0), GeometricBlend(epsilon=0.0), TeacherPrefix(tokens=0.4)])
def test_what_has_moved_to_nothing_asks_no_teacher(still: Behaviour) -> None:
    assert of_answer(still, (0,), 0, 1) == OnPolicy()


@pytest.mark.parametrize("own", [Mixture(), GeometricBlend(), TeacherPrefix(), Interleave(k=3), SwitchAtSpike()])
def test_what_concerns_each_token_is_every_answers(own: Behaviour) -> None:
    assert {r.behaviour for r in asked(own)} == {own}


@pytest.mark.parametrize("wide", [Coin(student=0.5), Members(), Until()])
def test_no_engine_is_asked_what_concerns_a_group(wide: Behaviour) -> None:
    with pytest.raises(AssertionError, match="of a group"):
        Request("a", np.array([3], np.int32), (0,), 5, behaviour=wide)


# ---------------------------------------------------------------- what is refused
ONE = {"math": Teacher(model="somewhere")}
BLENDED = Method(name="trb", summary="", behaviour=GeometricBlend(epsilon=Linear(0.1, 0.0, 0.2)))


def test_the_one_local_teacher_writes_when_a_stage_needs_it() -> None:
    late = Method(name="m", summary="", stages=(Stage(until=0.5, branches=()), Stage(until=1.0, branches=(), behaviour=Mixture())))
    assert writing_teacher(BLENDED, "hf", 1.0, ONE) == writing_teacher(late, "hf", 1.0, ONE) == "math"


def test_a_student_that_writes_alone_is_refused_nothing() -> None:
    alone = Method(name="m", summary="", behaviour=Until())
    assert writing_teacher(alone, "vllm", 0.0, {}) == ""


def test_gold_needs_no_teacher_in_the_generator() -> None:
    assert writing_teacher(Method(name="m", summary="", behaviour=Coin(author="gold")), "hf", 0.0, {}) == ""


@pytest.mark.parametrize(
    ("engine", "temperature", "teachers", "words"),
    [
        ("vllm", 1.0, ONE, r'"trb" writes with a teacher.*behaviour GeometricBlend.*generator.engine = "vllm".*Set it to "hf"'),
        ("scripted", 1.0, ONE, r'generator.engine = "scripted"'),
        ("hf", 0.0, ONE, r"generator.temperature = 0 draws nothing. Raise it"),
        ("hf", 1.0, ONE | {"code": Teacher(model="x")}, r"place for one, but the run has 2: code, math. Leave one"),
        ("hf", 1.0, {"far": Teacher(url="http://a:1")}, r"teachers.far is reached by url \(http://a:1\).*teachers.far.model"),
    ],
)
def test_a_teacher_that_cannot_sit_in_the_generator_is_refused(
    engine: str, temperature: float, teachers: dict[str, Teacher], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        writing_teacher(BLENDED, engine, temperature, teachers)


def test_it_is_refused_without_torch() -> None:
    code = "import sys; from streamopd.generate.commission import writing_teacher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
