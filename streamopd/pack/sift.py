"""What goes on of a scored group: the filters first, then the method's rule over what they left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from streamopd.schemas import Scored
from streamopd.slots import Select

from .filters import keep_accepted, refusal
from .select import SELECTED_OUT, selection


class Sifted(NamedTuple):
    """A group on its way."""

    scored: Scored        # without what does not go on; whole, when nothing does
    reason: str | None    # why nothing goes on
    selected_out: int     # answers that the rule took out


def sift(scored: Scored, refused: Sequence[str | None], rule: Select) -> Sifted:
    """`scored` without the rollouts that are `refused` and those that `rule` takes out of the others."""
    reason = refusal(refused)
    if reason is not None:
        return Sifted(scored, reason, 0)
    accepted = keep_accepted(scored, refused)
    reasons = selection(accepted, rule)
    reason, selected_out = refusal(reasons), reasons.count(SELECTED_OUT)
    return Sifted(scored if reason else keep_accepted(accepted, reasons), reason, selected_out)
