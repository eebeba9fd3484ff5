"""The learning rate of a step: warm up, hold, cosine down."""

from __future__ import annotations

from math import cos, pi

from msgspec import Struct


class Schedule(Struct, frozen=True, kw_only=True):
    """`max_steps` 0: the end is not known, so the rate is held."""

    lr: float
    max_steps: int
    warmup_steps: int
    hold_fraction: float  # of max_steps at full rate
    min_lr_ratio: float   # where the cosine ends


def lr_at(step: int, schedule: Schedule) -> float:
    """The rate of step `step`, counted from 0."""
    warm = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    return schedule.lr * warm * _decay(step, schedule)


def _decay(step: int, schedule: Schedule) -> float:
    held = schedule.hold_fraction * schedule.max_steps
    if step < held or held >= schedule.max_steps:
        return 1.0
    progress = min(1.0, (step - held) / (schedule.max_steps - held))
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * 0.5 * (1 + cos(pi * progress))
