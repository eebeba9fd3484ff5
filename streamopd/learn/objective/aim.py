"""What is aimed at: the target distribution, made of teacher q, student p (without gradient) and reference b."""

from __future__ import annotations

from torch import Tensor

from streamopd.slots import Extrapolate, Interpolate, Target, Teacher, Tempered, Veto

from .cells import NEVER


def aim(p: Tensor, q: Tensor, b: Tensor | None, target: Target) -> Tensor:
    """The target's log-masses up to a constant of the position; `normalised` makes a distribution of them."""
    if isinstance(target, Teacher):
        return q
    if isinstance(target, Veto):
        return q + target.beta * p.detach()  # type: ignore[operator]  # settled: a plain number
    if isinstance(target, Interpolate):
        return (1 - target.t) * p.detach() + target.t * q  # type: ignore[operator]
    if isinstance(target, Tempered):
        return q / target.temperature  # type: ignore[operator]
    assert isinstance(target, Extrapolate)
    assert b is not None, "a target beyond the teacher needs the reference's view"
    return target.strength * q + (1 - target.strength) * b  # type: ignore[operator]


def normalised(aimed_NC: Tensor, q_NC: Tensor, target: Target) -> Tensor:
    """[N, C] log-masses that sum to one; a teacher's own are left as they are, and what cannot occur stays so."""
    if isinstance(target, Teacher):
        return q_NC
    return aimed_NC.masked_fill(q_NC <= NEVER / 2, NEVER).log_softmax(-1).clamp(min=NEVER)
