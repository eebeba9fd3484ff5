"""Which answers of a group go on, by the method's rule. Pure: a reason for each rollout, None for those that go on.

A rule compares grades. Where one is missing nothing can be compared, and the group leaves whole as `ungraded`: to take an
answer for right or for wrong would be a verdict of our own.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamopd.schemas import Rollout, Scored
from streamopd.slots import Balance, BestOf, DropEqual, Everything, PassBetween, RankPair, Select

SELECTED_OUT, UNGRADED = "selected_out", "ungraded"


def selection(scored: Scored, rule: Select) -> list[str | None]:
    """A reason for each rollout that the rule takes out, None for those that go on; in the group's order."""
    rollouts = scored.group.rollouts
    if isinstance(rule, Everything):
        return [None] * len(rollouts)
    by_correctness = isinstance(rule, PassBetween | Balance)
    grades = [_correct(rollout) if by_correctness else _reward(rollout) for rollout in rollouts]
    known = [grade for grade in grades if grade is not None]
    if len(known) < len(grades):
        return [UNGRADED] * len(rollouts)
    kept = _kept(known, rule)
    return [None if i in kept else SELECTED_OUT for i in range(len(rollouts))]


def _correct(rollout: Rollout) -> float | None:
    verdict = rollout.outcome.correct if rollout.outcome else None
    return None if verdict is None else float(verdict)


def _reward(rollout: Rollout) -> float | None:
    return rollout.outcome.reward if rollout.outcome else None


def _kept(grades: Sequence[float], rule: Select) -> set[int]:
    """Which of a group's answers go on; `grades` are rewards, or 1 and 0 where the rule asks who is correct."""
    everyone = set(range(len(grades)))
    best_first = sorted(everyone, key=lambda i: (-grades[i], i))
    if isinstance(rule, PassBetween):
        return everyone if grades and rule.low <= sum(grades) / len(grades) <= rule.high else set()
    if isinstance(rule, DropEqual):
        return everyone if len(set(grades)) > 1 else set()
    if isinstance(rule, BestOf):
        return set(best_first[: rule.count])
    if isinstance(rule, RankPair):
        worst = min(everyone, key=lambda i: (grades[i], i), default=-1)
        return {best_first[0], worst} if len(set(grades)) > 1 else set()
    assert isinstance(rule, Balance)
    right, wrong = ([i for i in everyone if bool(grades[i]) is kind] for kind in (True, False))
    few = min(len(right), len(wrong))
    return set(right[:few] + wrong[:few]) if few else everyone
