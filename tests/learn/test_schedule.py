"""The learning rate warms up, holds, and follows a cosine to its floor."""

from __future__ import annotations

import pytest

from streamopd.learn.schedule import Schedule, lr_at

QUICKSTART = Schedule(lr=1.0, max_steps=500, warmup_steps=30, hold_fraction=0.4, min_lr_ratio=0.05)


@pytest.mark.parametrize(("step", "lr"), [
    (0, 1 / 30), (14, 0.5), (29, 1.0), (199, 1.0), (200, 1.0), (350, 0.525), (500, 0.05), (900, 0.05),
])
def test_a_step_has_its_rate(step: int, lr: float) -> None:
    assert lr_at(step, QUICKSTART) == pytest.approx(lr)


def test_a_run_without_a_known_end_holds_its_rate() -> None:
    assert lr_at(10**6, Schedule(lr=2.0, max_steps=0, warmup_steps=0, hold_fraction=0.4, min_lr_ratio=0.1)) == 2.0


def test_a_hold_of_the_whole_run_never_decays() -> None:
    assert lr_at(99, Schedule(lr=2.0, max_steps=100, warmup_steps=0, hold_fraction=1.0, min_lr_ratio=0.1)) == 2.0
