"""Stages that end on a plateau: by the figures of past steps alone, the same way again after a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamopd.learn.course import Course
from streamopd.learn.trainer import Trainer
from streamopd.methods.about.describe import card
from streamopd.schemas import Batch
from streamopd.slots import Branch, Coin, ForwardKL, Method, Plateau, ReverseKL, Stage

EDGES = (0.5, 0.8, 1.0)


def staged(plateau: Plateau | None, then: Plateau | None = None) -> Method:
    """Forward KL on the teacher's text, at a plateau or half of the run reverse KL, and once more."""
    losses, ends = (ForwardKL(), ReverseKL(), ForwardKL()), (plateau, then, None)
    return Method(name="m", summary="", stages=tuple(
        Stage(until=until, plateau=end, behaviour=Coin(student=number / 2), branches=(Branch(loss=loss),))
        for number, (until, end, loss) in enumerate(zip(EDGES, ends, losses, strict=True))
    ))


def run(course: Course, losses: list[float], steps: int = 100, first: int = 0) -> list[int]:
    """The stage that holds at each step."""
    stages = []
    for n, loss in enumerate(losses, first):
        stages.append(course.method.stage_at(n / steps, course.stage))
        course.note(n / steps, {"loss": loss})
    return stages


# ---------------------------------------------------------------- what a plateau is
@pytest.mark.parametrize(
    ("values", "reached"),
    [
        ([1.0] * 5, False),                              # of fewer than two windows nobody can say
        ([1.0] * 6, True),
        ([9.0, 9.0, 9.0, *[1.0] * 6], True),             # what lies further back is forgotten
        ([1.0, 2.0, 3.0, 3.0, 2.0, 1.0], True),          # means are compared, not steps
        ([1.0, 1.0, 1.0, 0.95, 0.95, 0.95], True),
        ([1.0, 1.0, 1.0, 0.85, 0.85, 0.85], False),      # it falls
        ([1.0, 1.0, 1.0, 1.15, 1.15, 1.15], False),      # and so it does not rest when it rises
        ([-1.0, -1.0, -1.0, -0.95, -0.95, -0.95], True),
        ([0.0] * 6, True),
    ],
)
def test_two_windows_with_the_same_mean_are_a_plateau(values: list[float], reached: bool) -> None:
    assert Plateau(window=3, change=0.1).reached(values) is reached


def test_an_accuracy_that_has_not_begun_to_rise_does_not_rest() -> None:
    assert not Plateau(figure="accuracy", window=3).reached([0.0] * 6)
    assert Plateau(figure="accuracy", window=3).reached([0.5] * 6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Plateau(window=0), "window of at least 1"),
        (lambda: Plateau(change=0.0), "change above 0"),
        (lambda: Method(name="m", summary="", stages=(Stage(until=1.0, branches=(), plateau=Plateau()),)), "no stage comes after"),
        (lambda: staged(Plateau(figure="los")), "stages is not what it can be"),
    ],
)
def test_a_plateau_that_means_nothing_is_refused(wrong: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrong()


# ---------------------------------------------------------------- the course of a run
def test_a_stage_ends_at_its_plateau_and_the_next_begins_with_no_past() -> None:
    course = Course(staged(Plateau(window=2, change=0.1), Plateau(window=3, change=0.1)))
    assert run(course, [5, 3, 1, 1, 1, 1, *[1] * 8]) == [0] * 6 + [1] * 6 + [2] * 2


def test_without_a_plateau_progress_ends_a_stage_as_ever() -> None:
    falling = [1000.0 / (n + 1) for n in range(100)]
    assert run(Course(staged(Plateau(window=2, change=1e-6))), falling) == [0] * 50 + [1] * 30 + [2] * 20
    assert run(Course(staged(None)), [1.0] * 100) == [0] * 50 + [1] * 30 + [2] * 20


def test_steps_without_the_figure_are_not_counted() -> None:
    course = Course(staged(Plateau(window=1)))
    for figures in ({"loss": 1.0}, {}, {"accuracy": 1.0}):
        course.note(0.0, figures)
    assert course.stage == 0
    course.note(0.0, {"loss": 1.0})
    assert course.stage == 1


@given(st.lists(st.sampled_from([1.0, 2.0]), min_size=1, max_size=80), st.integers(0, 80))
def test_a_course_that_was_saved_and_loaded_goes_on_as_if_it_had_not_been(losses: list[float], at: int) -> None:
    method = staged(Plateau(window=3, change=0.1), Plateau(window=2, change=0.1))
    whole = run(Course(method), losses)
    first, second = Course(method), Course(method)
    before = run(first, losses[:at])
    second.load(first.state())
    assert before + run(second, losses[at:], first=at) == whole
    assert whole == sorted(whole)


def test_a_method_without_stages_has_no_course() -> None:
    course = Course(Method(name="m", summary=""))
    course.note(0.3, {"loss": 1.0})
    assert (course.stage, course.values) == (0, [])
    assert course.at(0.3) == course.method


def test_show_tells_where_a_stage_may_end() -> None:
    assert "figure = overlap_ratio, window = 20, change = 0.01" in card(staged(Plateau(figure="overlap_ratio")))


# ---------------------------------------------------------------- in the trainer
def test_the_trainer_learns_by_the_next_stage_from_the_step_after_its_plateau(
    tied: Path, open_trainer: Callable[..., Trainer], make_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    method = staged(Plateau(window=1, change=0.1))  # with a rate of 0 the same answers have the same loss
    trainer = open_trainer(tied, method, lr=0.0)
    batches = [make_batch(n, range(4), method) for n in range(4)]
    seen = [trainer.train(batch).metrics for batch in batches[:1]]
    trainer.save(tmp_path)
    seen += [trainer.train(batch).metrics for batch in batches[1:]]
    assert [figures["stage"] for figures in seen] == [0, 0, 1, 1]
    forward, reverse = ({figures["loss"] for figures in some} for some in (seen[:2], seen[2:]))
    assert not forward & reverse
    again = open_trainer(tied, method, lr=0.0)
    again.load(tmp_path)
    assert [again.train(batch).metrics for batch in batches[1:]] == seen[1:]


def test_a_state_of_a_method_without_stages_says_so(tied: Path, open_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = open_trainer(tied)
    trainer.save(tmp_path)
    again = open_trainer(tied)
    again.load(tmp_path)
    assert all(torch.equal(one, again._state()[name]) for name, one in trainer._state().items())


def test_a_stage_that_ended_by_its_time_alone_comes_back_when_the_run_is_made_longer() -> None:
    course, method = Course(staged(None)), staged(None)
    course.note(0.6, {"loss": 1.0})
    assert method.stage_at(0.6, course.stage) == 1
    assert method.stage_at(0.3, course.stage) == 0, "of twice the steps it is the first stage again, as its moving numbers are"


def test_a_method_whose_stages_only_plateaus_end_can_be_shown() -> None:
    branches = (Branch(loss=ForwardKL()),), (Branch(loss=ForwardKL()), Branch(loss=ReverseKL()))
    method = Method(name="m", summary="", stages=tuple(
        Stage(until=1.0, plateau=end, branches=some) for end, some in zip((Plateau(), None), branches, strict=True)
    ))
    shown = card(method)
    assert "until a Plateau" in shown
    assert shown.count("branch 1") == 2
    assert shown.count("branch 2") == 1
