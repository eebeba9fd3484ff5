"""Every held-out question is answered once, in order, and counted with its style; no verdict is no wrong answer."""

from __future__ import annotations

import numpy as np
import pytest

from streamopd.evaluate.divergence import Pair
from streamopd.evaluate.heldout import (
    Heard,
    Heldout,
    accuracies,
    accuracy,
    answer_all,
    by_style,
    kl_heldout,
    shown,
    student_context,
    teacher_context,
)
from streamopd.generate.engine import Request
from streamopd.generate.hf import HFEngine
from streamopd.schemas import Finish, Outcome
from tests.evaluate.conftest import prompt
from tests.evaluate.test_divergence import plain_kl

STOP = 5
PROMPTS = [prompt(i, [1, 2 + i % 9, 3]) for i in range(21)]


@pytest.fixture
def engine(student_folder):
    return HFEngine(student_folder, stop_ids=[STOP], max_inflight=8, temperature=1.0)


def heard(seq: int, completion: list[int], finish: Finish = Finish.STOP, **facts) -> Heard:
    return Heard(prompt(seq, [1, 2], **facts), np.array(completion, np.int32), finish)


def test_more_prompts_than_slots_are_all_answered_in_order(engine):
    answers = answer_all(engine, Request, PROMPTS, 6, 0, student_context)
    assert [answer.prompt.seq for answer in answers] == list(range(21))
    assert engine.inflight == 0
    for answer in answers:
        stopped = answer.completion_ids[-1] == STOP
        assert answer.finish is (Finish.STOP if stopped else Finish.LENGTH)
        assert stopped or len(answer.completion_ids) == 6


def test_an_evaluation_can_be_repeated(engine):
    def once(seed: int) -> list[list[int]]:
        return [a.completion_ids.tolist() for a in answer_all(engine, Request, PROMPTS, 6, seed, student_context)]

    assert once(0) == once(0)
    assert once(0) != once(1)


def test_the_teacher_answers_in_its_own_context(engine):
    with_shots = [prompt(i, [1, 2], teacher_ids=[1, 9, 9, 4, 2]) for i in range(3)]
    answers = answer_all(engine, Request, with_shots, 6, 0, teacher_context)
    same = answer_all(engine, Request, [prompt(i, [1, 9, 9, 4, 2]) for i in range(3)], 6, 0, student_context)
    assert [a.completion_ids.tolist() for a in answers] == [a.completion_ids.tolist() for a in same]


def test_accuracy_is_the_share_that_the_grader_calls_correct(student_folder):
    greedy = HFEngine(student_folder, stop_ids=[STOP], max_inflight=8, temperature=0.0)
    asked = []

    def grade(items):
        asked.extend(items)
        return [Outcome(1.0, seq % 3 == 0) for seq, _ in enumerate(items)]

    found = accuracy(greedy, Request, PROMPTS, grade, lambda ids: f"{len(ids)} ids", kind="greedy", max_new=6)
    lengths = [len(answer.completion_ids) for answer in found.answers]
    assert found.metrics == {
        "accuracy_greedy": pytest.approx(7 / 21), "completion_length": pytest.approx(np.mean(lengths)),
        "truncated_ratio": pytest.approx(np.mean([a.finish is Finish.LENGTH for a in found.answers])), "prompts": 21.0,
    }
    assert [(text, stopped) for _, text, stopped in asked] == [
        (f"{len(a.completion_ids)} ids", a.finish is Finish.STOP) for a in found.answers
    ]


def test_without_a_verdict_there_is_no_accuracy_rather_than_zero():
    answers = [heard(0, [5]), heard(1, [5])]
    assert accuracies("greedy", answers, [None, None]) == {}
    assert accuracies("greedy", answers, [Outcome(0.0), Outcome(0.0)]) == {}


def test_a_failed_grading_is_left_out_and_told():
    answers = [heard(0, [5]), heard(1, [5]), heard(2, [5])]
    assert accuracies("sampled", answers, [Outcome(1.0, True), None, Outcome(0.0, False)]) == {
        "accuracy_sampled": 0.5, "ungraded": 1.0,
    }


def test_each_style_has_its_own_figure():
    values = [(prompt(0, [1], style="json"), 1.0), (prompt(1, [1], style="json"), 0.0), (prompt(2, [1], style="prose"), 1.0)]
    assert by_style("accuracy_greedy", values) == {
        "accuracy_greedy": pytest.approx(2 / 3), "accuracy_greedy/json": 0.5, "accuracy_greedy/prose": 1.0,
    }
    assert by_style("accuracy_greedy", []) == {}


def test_heldout_kl_is_a_token_mean_with_each_teacher_and_each_context(student, teacher):
    theirs = [
        heard(0, [7, 8, 5], teacher_ids=[1, 9, 4, 2], teacher_id="json", style="json"),
        heard(1, [3, 5], teacher_id="plain", style="prose"),
    ]
    mine = [heard(0, [6, 5], teacher_ids=[1, 9, 4, 2], teacher_id="json", style="json")]
    found = kl_heldout(student, {"json": teacher, "plain": student}, theirs, mine)

    shots, plain = np.array([1, 9, 4, 2]), np.array([1, 2])
    forward = plain_kl(teacher, student, Pair(shots, plain, np.array([7, 8, 5])))
    reverse = plain_kl(student, teacher, Pair(plain, shots, np.array([6, 5])))
    assert found == {
        "kl_teacher_student": pytest.approx(forward / 5, abs=1e-4),  # the plain teacher is the student: 0 on its 2 tokens
        "kl_teacher_student/json": pytest.approx(forward / 3, abs=1e-4),
        "kl_teacher_student/prose": pytest.approx(0.0, abs=1e-5),
        "kl_student_teacher": pytest.approx(reverse / 2, abs=1e-4),
        "kl_student_teacher/json": pytest.approx(reverse / 2, abs=1e-4),
    }
    assert forward / 3 > 0.2


def test_no_answers_give_no_kl(student, teacher):
    assert kl_heldout(student, {"default": teacher}, [], [heard(0, [], Finish.ERROR)]) == {}


def test_shown_answers_take_the_styles_in_turn():
    answers = [heard(i, [i, 5], style="json" if i < 4 else "prose") for i in range(6)]
    found = shown(Heldout(answers, [Outcome(1.0, True), None, *[Outcome(0.0, False)] * 4], {}), str, 3)
    assert [(s["prompt"], s["completion"], s["correct"]) for s in found] == [
        ("question 0", "[0, 5]", "yes"), ("question 4", "[4, 5]", "no"), ("question 1", "[1, 5]", ""),
    ]


