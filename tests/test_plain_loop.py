"""`max_staleness = 0` is the plain synchronous loop, number for number."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamopd import config as configs
from streamopd.assets import resolve
from streamopd.cli.inprocess import run_in_process
from streamopd.watch.journal import read
from streamopd.worker import Run
from tests.plain_loop import plain_loop

STEPS = 6
OVERRIDES = [
    "max_staleness=0", f"learn.max_steps={STEPS}", "learn.groups_per_step=8", "learn.warmup_steps=2", "evaluate.enabled=false",
    "seed=3", "sync.drill=false",
]


def test_no_staleness_gives_the_losses_of_the_plain_loop(tmp_path: Path) -> None:
    config, _ = configs.load("quickstart", OVERRIDES)
    assert run_in_process(Run.create(tmp_path / "run", config)) == 0
    losses = [line["metrics"]["loss"] for line in read(tmp_path / "run" / "metrics.jsonl")]
    expected = plain_loop(config, resolve(config.student.model), resolve(config.teachers["default"].model), STEPS)
    assert losses == pytest.approx(expected, abs=1e-5)
