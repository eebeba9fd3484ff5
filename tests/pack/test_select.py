"""A rule takes out some answers of a group; what is kept and what is taken out are all of them, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamopd.pack.select import SELECTED_OUT, UNGRADED, selection
from streamopd.pack.sift import sift
from streamopd.schemas import Outcome, Scored
from streamopd.slots import Balance, BestOf, DropEqual, Everything, PassBetween, RankPair, Select
from tests.pack.test_filters import answer, make_scored

RULES: list[Select] = [
    Everything(), PassBetween(0.25, 0.75), DropEqual(), Balance(), BestOf(), BestOf(count=3), RankPair(),
]
OUTCOMES = st.builds(Outcome, st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans())
DISTINCT = st.lists(st.floats(-1, 1), min_size=1, max_size=8, unique=True).map(
    lambda rewards: [Outcome(reward, i % 3 == 0) for i, reward in enumerate(rewards)]
)


def graded(outcomes: Sequence[Outcome | None]) -> Scored:
    scored = make_scored(*[answer() for _ in outcomes])
    rollouts = [msgspec.structs.replace(r, outcome=o) for r, o in zip(scored.group.rollouts, outcomes, strict=True)]
    return msgspec.structs.replace(scored, group=msgspec.structs.replace(scored.group, rollouts=rollouts))


def rewarded(*rewards: float) -> Scored:
    return graded([Outcome(reward) for reward in rewards])


def judged(*correct: bool) -> Scored:
    return graded([Outcome(0.0, verdict) for verdict in correct])


def kept(scored: Scored, rule: Select) -> list[int]:
    return [i for i, reason in enumerate(selection(scored, rule)) if reason is None]


@pytest.mark.parametrize(("scored", "rule", "expected"), [
    (judged(True, False, False, False), PassBetween(0.25, 0.75), [0, 1, 2, 3]),
    (judged(True, True, True, False), PassBetween(0.25, 0.75), [0, 1, 2, 3]),
    (judged(False, False, False, False), PassBetween(0.25, 0.75), []),
    (judged(True, True, True, True), PassBetween(0.25, 0.75), []),
    (judged(False), PassBetween(), [0]),
    (rewarded(1, 1, 1), DropEqual(), []),
    (rewarded(1, 1, 0.5), DropEqual(), [0, 1, 2]),
    (rewarded(1), DropEqual(), []),
    (judged(False, True, False, False, True), Balance(), [0, 1, 2, 4]),
    (judged(False, False, True, False), Balance(), [0, 2]),
    (judged(True, True), Balance(), [0, 1]),
    (judged(False, False), Balance(), [0, 1]),
    (rewarded(0, 2, 1, 2), BestOf(), [1]),
    (rewarded(0, 2, 1, 2), BestOf(count=3), [1, 2, 3]),
    (rewarded(0, 2), BestOf(count=8), [0, 1]),
    (rewarded(1, 3, 0, 3, 0), RankPair(), [1, 2]),
    (rewarded(0, 3), RankPair(), [0, 1]),
    (rewarded(2, 2, 2), RankPair(), []),
    (rewarded(2), RankPair(), []),
], ids=str)
def test_a_rule_keeps_what_it_says(scored: Scored, rule: Select, expected: list[int]) -> None:
    assert kept(scored, rule) == expected


@given(st.lists(OUTCOMES, min_size=1, max_size=8), st.sampled_from(RULES))
def test_kept_and_selected_out_are_all_and_nothing_is_new(outcomes: list[Outcome], rule: Select) -> None:
    scored = graded(outcomes)
    sifted = sift(scored, [None] * len(outcomes), rule)
    ids = [rollout.id for rollout in scored.group.rollouts]
    if sifted.reason is not None:
        assert (sifted.reason, sifted.selected_out) == (SELECTED_OUT, len(outcomes))
        assert sifted.scored is scored
        return
    left = [rollout.id for rollout in sifted.scored.group.rollouts]
    assert len(left) + sifted.selected_out == len(ids)
    assert left == [rollout_id for rollout_id in ids if rollout_id in left]
    assert [views[0].rollout_id for views in sifted.scored.views] == left


@given(DISTINCT, st.sampled_from(RULES), st.randoms(use_true_random=False))
def test_another_order_of_the_group_keeps_the_same_answers(outcomes: list[Outcome], rule: Select, random: Random) -> None:
    """Of equals the first goes on: rewards differ here, and for `Balance`, to which all of a kind are equal, how many."""
    order = list(range(len(outcomes)))
    random.shuffle(order)
    straight, turned = kept(graded(outcomes), rule), kept(graded([outcomes[i] for i in order]), rule)
    back = sorted(order[i] for i in turned)
    if isinstance(rule, Balance):
        assert [sum(outcomes[i].correct is True for i in found) for found in (back, straight)] == [
            sum(outcomes[i].correct is True for i in straight)] * 2
        assert len(back) == len(straight)
    else:
        assert back == straight


@given(st.lists(st.none() | OUTCOMES, max_size=8))
def test_everything_keeps_all_and_asks_nobody(outcomes: list[Outcome | None]) -> None:
    scored = graded(outcomes)
    assert kept(scored, Everything()) == list(range(len(outcomes)))
    if outcomes:
        assert sift(scored, [None] * len(outcomes), Everything()) == (scored, None, 0)


@pytest.mark.parametrize("rule", RULES[1:], ids=str)
def test_a_group_with_an_answer_nobody_graded_leaves_as_ungraded(rule: Select) -> None:
    scored = graded([Outcome(1.0, True), None, Outcome(0.0, False)])
    assert selection(scored, rule) == [UNGRADED] * 3
    assert sift(scored, [None] * 3, rule) == (scored, UNGRADED, 0)


def test_a_reward_alone_does_not_say_who_is_correct() -> None:
    assert selection(rewarded(1, 0), Balance()) == [UNGRADED] * 2
    assert selection(rewarded(1, 0), RankPair()) == [None] * 2


def test_the_rule_sees_what_the_filters_left() -> None:
    scored = graded([Outcome(5.0), Outcome(1.0), Outcome(2.0), None])
    sifted = sift(scored, ["truncated", None, None, "error"], BestOf())
    assert [rollout.id for rollout in sifted.scored.group.rollouts] == ["p0.2"]
    assert (sifted.reason, sifted.selected_out) == (None, 1)
    assert sift(scored, ["truncated"] * 4, BestOf()) == (scored, "truncated", 0)
