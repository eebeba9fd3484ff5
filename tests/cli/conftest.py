"""Runs of a few steps without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from streamopd import config as configs
from streamopd.worker import Run

MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run in one folder, however often it is asked for, as the command makes one."""

    def make(*overrides: str) -> Run:
        config, _ = configs.load("quickstart", ["learn.max_steps=2", "evaluate.enabled=false", *overrides])
        run = Run.create(tmp_path / "run", config)
        run.stop_file.unlink(missing_ok=True)
        return run

    return make
