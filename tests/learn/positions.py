"""Single positions for the objective: logits beside what teachers say, and columns that a record would give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamopd.learn.objective import Known, Look, Target, Verdict, Views, judge
from streamopd.slots import Method


def known_about(ids: Tensor, **columns: object) -> Known:
    """Tokens of one correct-or-not-graded answer of the student's own, sampled by the live student unless `logmu` says otherwise."""
    count, plain = len(ids), torch.ones(len(ids))
    defaults = {
        "row": torch.zeros(count, dtype=torch.long), "group": torch.zeros(count, dtype=torch.long), "position": torch.arange(count),
        "segment": torch.zeros(count, dtype=torch.long), "ids": ids, "author": torch.zeros(count, dtype=torch.long),
        "logmu": torch.zeros(count), "temperature": plain, "correct": plain * torch.nan, "pass_rate": plain * torch.nan,
        "advantage": torch.zeros(count), "uniform": torch.zeros(count), "weight": plain,
    }
    return Known(**(defaults | {name: torch.as_tensor(value) for name, value in columns.items()}))  # type: ignore[arg-type]


def look_at(
    logits: Tensor, target: Target | None, stop_ids: Sequence[int] = (), reference: Target | None = None, **columns: object
) -> Look:
    """A look at tokens; what was written is what the target says, or `ids`."""
    ids = columns.pop("ids", None)
    written = torch.as_tensor(ids) if ids is not None else target.sampled  # type: ignore[union-attr]
    return Look(logits, Views(target, reference), known_about(written, **columns), stop_ids)


def told(
    logits: Tensor, target: Target | None, method: Method, stop_ids: Sequence[int] = (), reference: Target | None = None,
    **columns: object,
) -> Verdict:
    """The verdict on each token."""
    return judge(look_at(logits, target, stop_ids, reference, **columns), method.at(0.0))
