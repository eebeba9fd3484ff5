"""The dataset's answer through the decode path: written as it is, with the student's own log-probs, swaps and company or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from streamopd.generate.engine import Answer, Request
from streamopd.generate.hf import HFEngine
from streamopd.generate.kernel import kernel_logp
from streamopd.schemas import Author, Finish, Rollout, decode, encode
from streamopd.slots import Behaviour, Coin, Mixture, OnPolicy

from .conftest import POSITIONS, STOP, VOCABULARY, OpenEngine, Publish, answer_all, plain, requests, student_logits

GOLD, WHOLE, MIXED = Coin(student=0.0, author="gold"), Coin(student=0.0), Mixture(alpha=0.4)
EVERY: list[Behaviour] = [GOLD, OnPolicy(), GOLD, WHOLE, MIXED]
KERNEL = {"temperature": 0.8, "top_p": 0.9}


def given(todo: list[Request], behaviours: list[Behaviour], stop: int = STOP) -> list[Request]:
    """The requests, one behaviour after the other; gold is of 1 to 20 random ids and a stop id."""
    rng = np.random.default_rng(3)
    found = []
    for i, request in enumerate(todo):
        behaviour = behaviours[i % len(behaviours)]
        gold = np.append(rng.integers(3, VOCABULARY, rng.integers(1, 20)), stop).astype(np.int32) if behaviour == GOLD else None
        max_new = request.max_new if gold is None else len(gold)
        found.append(msgspec.structs.replace(request, behaviour=behaviour, gold_ids=gold, max_new=max_new))
    return found


def golden(answers: dict[str, Answer]) -> list[Answer]:
    return [answer for answer in answers.values() if answer.request.behaviour == GOLD]


def students_own(answer: Answer, models: dict[int, object], temperature: float) -> np.ndarray:
    """[G] log-probs under the student's kernel before top-p, from plain forwards of the weights that the spans name."""
    logp = kernel_logp(student_logits(answer, models).double(), temperature or 1.0, 1.0).numpy()  # type: ignore[arg-type]
    return logp[np.arange(len(logp)), answer.completion_ids]


@pytest.fixture
def open_pair(open_hf: OpenEngine, teacher_folder: Path) -> Callable[..., HFEngine]:
    return lambda **values: open_hf(**({"teacher": teacher_folder} | values))


@pytest.mark.parametrize("kernel", [{}, KERNEL, {"temperature": 0.0}], ids=["plain", "cut", "greedy"])
def test_gold_is_written_to_the_letter_with_the_log_probs_of_the_students_whole_kernel(
    open_hf: OpenEngine, folder: Path, kernel: dict[str, float]
) -> None:
    """Without a teacher in the engine; ids outside a nucleus have their log-probs too."""
    answers = golden(answer_all(open_hf(student_k=3, **kernel), given(requests(24), [GOLD, OnPolicy()]), at_once=3))
    temperature, model = kernel.get("temperature", 1.0), plain(folder)
    assert len(answers) == 12
    for answer in answers:
        assert answer.request.gold_ids is not None
        assert answer.completion_ids.tolist() == answer.request.gold_ids.tolist()
        np.testing.assert_allclose(answer.logprobs, students_own(answer, {-1: model}, temperature), atol=2e-4)
        assert answer.topk_ids is not None
        assert answer.topk_ids.shape == (len(answer.completion_ids), 3)
        record = decode(Rollout, encode(answer.rollout()))
        assert (record.authors, record.finish, record.temperature, record.top_p) == ([Author(0, "gold")], Finish.STOP, temperature, 1.0)


@pytest.mark.parametrize("kv", ["keep", "recompute"])
def test_a_swap_in_flight_changes_whose_log_probs_they_are_and_no_letter(
    open_hf: OpenEngine, publish_shaken: Publish, tmp_path: Path, kv: str
) -> None:
    engine = open_hf(max_inflight=6, kv=kv)
    engine.swap_in(publish_shaken(0), tmp_path)
    todo, answers = given(requests(18), [GOLD, OnPolicy()]), []
    for step in range(80):
        engine.admit([todo.pop() for _ in range(min(engine.free, len(todo)))])
        answers += engine.step()
        if step in (2, 5, 9):
            engine.swap_in(publish_shaken(step), tmp_path)
    models = {n: plain(tmp_path / f"weight_v{n:06d}") for n in (0, 2, 5, 9)}
    found = golden({answer.request.id: answer for answer in answers})
    assert (len(answers), len(found)) == (18, 9)
    assert max(len(answer.spans) for answer in found) >= 3
    for answer in found:
        assert answer.completion_ids.tolist() == answer.request.gold_ids.tolist()  # type: ignore[union-attr]
        np.testing.assert_allclose(answer.logprobs, students_own(answer, models, 1.0), atol=2e-4)


def test_others_write_the_same_beside_gold_as_without_it(open_pair: Callable[..., HFEngine]) -> None:
    todo = given(requests(40), EVERY)
    alone = answer_all(open_pair(max_inflight=1, **KERNEL), todo)
    crowd = answer_all(open_pair(max_inflight=40, **KERNEL), todo)
    trickle = answer_all(open_pair(max_inflight=5, **KERNEL), list(reversed(todo)), at_once=2)
    assert len(golden(alone)) == 16
    for name, answer in alone.items():
        for other in (crowd[name], trickle[name]):
            assert answer.completion_ids.tolist() == other.completion_ids.tolist()
            assert answer.authors == other.authors
            np.testing.assert_allclose(answer.logprobs, other.logprobs, atol=2e-5)


def test_gold_asks_no_teacher(open_pair: Callable[..., HFEngine]) -> None:
    engine = open_pair()
    assert engine._coauthor is not None
    engine._coauthor._decoder.advance = None  # type: ignore[method-assign, assignment]
    answers = golden(answer_all(engine, given(requests(8), [GOLD])))
    assert {answer.finish for answer in answers} == {Finish.STOP}


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_ids_that_the_model_has_not_are_answered_with_their_error_and_trouble_nobody(open_hf: OpenEngine, wrong: int) -> None:
    todo = given(requests(6), [GOLD, OnPolicy()])
    bad = msgspec.structs.replace(todo[0], gold_ids=np.array([3, wrong, STOP], np.int32), max_new=3)
    answers = answer_all(open_hf(), [bad, *todo[1:]])
    assert "The gold answer holds ids from" in answers[bad.id].error
    assert {answer.finish for name, answer in answers.items() if name != bad.id} <= {Finish.STOP, Finish.LENGTH}


def test_gold_that_does_not_fit_into_the_model_is_answered_with_its_error(open_hf: OpenEngine) -> None:
    gold = np.append(np.full(POSITIONS, 3), STOP).astype(np.int32)
    long = Request("long", np.array([3], np.int32), (0,), len(gold), GOLD, gold_ids=gold)
    assert f"{POSITIONS + 1} new tokens are more than" in answer_all(open_hf(), [long])["long"].error


def test_weights_of_nan_end_gold_with_an_error_that_blames_no_teacher(
    open_pair: Callable[..., HFEngine], publish_shaken: Publish, tmp_path: Path
) -> None:
    engine = open_pair()
    engine.swap_in(publish_shaken(1, fill=float("nan")), tmp_path)
    for answer in answer_all(engine, given(requests(3), [GOLD])).values():
        assert (answer.finish, answer.error) == (Finish.ERROR, "The model's logits under weights 1 are not finite.")
        decode(Rollout, encode(answer.rollout()))
