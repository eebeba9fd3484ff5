"""A refusal has one reason, and only what is refused goes."""

from __future__ import annotations

from typing import Any

import pytest

from streamopd.pack.filters import keep_accepted, refusal, refusals
from streamopd.schemas import Array, Evidence, Finish, Group, Outcome, Prompt, Rollout, Scored, Span

LENIENT: dict[str, Any] = {"min_completion_length": 1, "drop_truncated": False, "drop_incorrect": False, "needs_evidence": True}
STRICT: dict[str, Any] = {"min_completion_length": 3, "drop_truncated": True, "drop_incorrect": True, "needs_evidence": True}


def answer(
    length: int = 5, finish: Finish = Finish.STOP, correct: bool | None = None
) -> tuple[int, Finish, bool | None]:
    return length, finish, correct


def make_scored(*answers: tuple[int, Finish, bool | None], evidence: bool = True) -> Scored:
    rollouts = [
        Rollout(
            id=f"p0.{i}", prompt_ids=Array.of([1], "int32"), completion_ids=Array.of([4] * length, "int32"), finish=finish,
            logprobs=Array.of([-1.0] * length, "float32"), weight_spans=[Span(0, 0)] if length else [],
            outcome=None if correct is None else Outcome(float(correct), correct),
        )
        for i, (length, finish, correct) in enumerate(answers)
    ]
    views = [[Evidence(rollout_id=r.id, logprobs=r.logprobs)] if evidence and len(r.completion_ids) else [] for r in rollouts]
    prompt = Prompt(id="p0", run="r", method="m", born_s=0.0, seq=0, prompt_ids=Array.of([1], "int32"))
    group = Group(id="g0", run="r", method="m", born_s=0.0, prompt=prompt, rollouts=rollouts)
    return Scored(id="s0", run="r", method="m", born_s=0.0, group=group, views=views)


@pytest.mark.parametrize(("of", "lenient", "strict"), [
    (answer(), None, None),
    (answer(correct=True), None, None),
    (answer(correct=False), None, "incorrect"),
    (answer(finish=Finish.LENGTH), None, "truncated"),
    (answer(length=2), None, "too_short"),
    (answer(length=0), "too_short", "too_short"),
    (answer(finish=Finish.ERROR), "error", "error"),
    (answer(length=0, finish=Finish.ERROR), "error", "error"),
    (answer(finish=Finish.ABORTED), "aborted", "aborted"),
])
def test_an_answer_is_refused_for_its_first_reason(
    of: tuple[int, Finish, bool | None], lenient: str | None, strict: str | None
) -> None:
    assert refusal(refusals(make_scored(of), **LENIENT)) == lenient
    assert refusal(refusals(make_scored(of), **STRICT)) == strict


def test_an_answer_nobody_graded_is_not_a_wrong_one() -> None:
    assert refusal(refusals(make_scored(answer(correct=None)), **STRICT)) is None


def test_an_answer_no_teacher_scored_is_refused_unless_the_method_asks_none() -> None:
    assert refusal(refusals(make_scored(answer(), evidence=False), **LENIENT)) == "no_evidence"
    assert refusal(refusals(make_scored(answer(), evidence=False), **LENIENT | {"needs_evidence": False})) is None


def test_a_group_stays_while_one_answer_does_and_goes_for_its_commonest_reason() -> None:
    mixed = make_scored(answer(finish=Finish.ERROR), answer(), answer(finish=Finish.LENGTH))
    assert refusal(refusals(mixed, **STRICT)) is None
    assert refusals(mixed, **STRICT) == ["error", None, "truncated"]
    lost = make_scored(answer(finish=Finish.LENGTH), answer(finish=Finish.ERROR), answer(finish=Finish.LENGTH))
    assert refusal(refusals(lost, **STRICT)) == "truncated"
    assert refusal(refusals(make_scored(), **LENIENT)) == "empty"


def test_refused_answers_leave_with_their_views() -> None:
    mixed = make_scored(answer(finish=Finish.ERROR), answer(length=7), answer(length=6))
    kept = keep_accepted(mixed, refusals(mixed, **STRICT))
    assert [r.id for r in kept.group.rollouts] == ["p0.1", "p0.2"]
    assert [views[0].rollout_id for views in kept.views] == ["p0.1", "p0.2"]
    assert keep_accepted(kept, [None, None]) is kept
