"""The same command on a folder that holds a completed run: nothing to do, more steps, or a fresh start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from streamopd.learn.checkpoint import load_newest
from streamopd.watch.journal import read
from tests.run.runs import SMALL, accounts_are_exact, no_process_is_left, overrides, streamopd, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
STEPS = 20
SETTINGS = (*SMALL, "evaluate.enabled=true", "data.heldout_size=16", f"learn.max_steps={STEPS}")
OURS = (".lock", "state", "logs", "events.jsonl")  # notes of the machinery, one more life of it among them


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completed") / "run"
    answer = run(folder)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    return folder


@pytest.fixture
def folder(completed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(completed, tmp_path / "run"))


def run(folder: Path, *settings: str, fresh: bool = False):  # type: ignore[no-untyped-def]
    flags = ["--fresh"] if fresh else []
    return streamopd("run", "quickstart", "--out", str(folder), *overrides(*SETTINGS, *settings), *flags)


def results(folder: Path) -> dict[str, bytes]:
    """Every file that a person or a program reads afterwards."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.relative_to(folder).parts[0] not in OURS)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def steps_in(folder: Path) -> list[int]:
    return [line["n"] for line in read(folder / "metrics.jsonl")]


def test_a_completed_run_started_again_says_so_and_changes_nothing(folder: Path) -> None:
    before = results(folder)
    answer = run(folder)
    assert answer.returncode == 0, answer.stderr
    assert "completed" in answer.stdout
    after = results(folder)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == set()
    no_process_is_left(folder)


def test_a_completed_run_goes_on_when_more_steps_are_asked_for(folder: Path) -> None:
    trained = trained_groups(folder)
    answer = run(folder, f"learn.max_steps={STEPS + 10}")
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    found = summary(folder)
    assert (found["status"], found["steps"]) == ("completed", STEPS + 10)
    assert found["groups_trained"] == 16 * (STEPS + 10)
    accounts_are_exact(found)
    assert trained < trained_groups(folder)
    assert steps_in(folder) == list(range(1, STEPS + 11))
    evaluated = [line["n"] for line in read(folder / "evaluations.jsonl") if line["who"] == "student"]
    assert max(evaluated) == STEPS + 10
    no_process_is_left(folder)


def test_fresh_starts_over_in_the_same_folder(folder: Path) -> None:
    identity, stranger = (folder / "state" / "run_id").read_text(), folder / "notes.txt"
    stranger.write_text("not of the run")
    answer = run(folder, "learn.max_steps=8", "seed=5", fresh=True)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    found = summary(folder)
    assert (found["status"], found["steps"], found["groups_trained"]) == ("completed", 8, 16 * 8)
    accounts_are_exact(found)
    assert steps_in(folder) == list(range(1, 9))
    assert (folder / "state" / "run_id").read_text() != identity
    assert {line["n"] for line in read(folder / "evaluations.jsonl")} == {0, 8}
    assert max(int(version.name.removeprefix("weight_v")) for version in (folder / "weights").glob("weight_v*")) == 8
    assert stranger.read_text() == "not of the run"
    no_process_is_left(folder)


def test_another_seed_in_the_same_folder_is_refused_without_fresh(folder: Path) -> None:
    before = results(folder)
    answer = run(folder, "seed=5")
    assert answer.returncode == 2
    assert "--fresh" in answer.stderr
    assert results(folder) == before


def trained_groups(folder: Path) -> set[int]:
    """By the account on the disk."""
    found = load_newest(folder / "state")
    assert found is not None
    return {seq for seq, fate in found.checkpoint.record.items() if fate == "trained"}
