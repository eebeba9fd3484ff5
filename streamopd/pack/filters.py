"""Why an answer or a group is not trained. Pure functions of what the group carries; each refusal is counted by its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from streamopd.schemas import Evidence, Finish, Rollout, Scored


def refusal(reasons: Sequence[str | None]) -> str | None:
    """Why nothing of a group is trained, given a reason for each rollout; None when something is. Of several, the commonest."""
    if not reasons:
        return "empty"
    counted = Counter(reason for reason in reasons if reason is not None)
    return counted.most_common(1)[0][0] if counted.total() == len(reasons) else None


def refusals(
    scored: Scored, min_completion_length: int, drop_truncated: bool, drop_incorrect: bool, needs_evidence: bool
) -> list[str | None]:
    """A reason for each rollout, None for those that are trained. A method that asks no teacher needs no evidence."""
    return [
        _rollout_refusal(rollout, views, min_completion_length, drop_truncated, drop_incorrect, needs_evidence)
        for rollout, views in zip(scored.group.rollouts, scored.views, strict=True)
    ]


def keep_accepted(scored: Scored, reasons: Sequence[str | None]) -> Scored:
    """The group without its refused rollouts."""
    if not any(reasons):
        return scored
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    group = msgspec.structs.replace(scored.group, rollouts=[scored.group.rollouts[i] for i in kept])
    return msgspec.structs.replace(scored, group=group, views=[scored.views[i] for i in kept])


def _rollout_refusal(
    rollout: Rollout, views: Sequence[Evidence], min_completion_length: int, drop_truncated: bool, drop_incorrect: bool,
    needs_evidence: bool,
) -> str | None:
    if rollout.finish is Finish.ERROR:
        return "error"
    if rollout.finish is Finish.ABORTED:
        return "aborted"
    if len(rollout.completion_ids) < max(1, min_completion_length):
        return "too_short"
    if needs_evidence and not views:
        return "no_evidence"
    if drop_truncated and rollout.finish is Finish.LENGTH:
        return "truncated"
    if drop_incorrect and rollout.outcome is not None and rollout.outcome.correct is False:
        return "incorrect"  # nobody's verdict is not a wrong answer
    return None
