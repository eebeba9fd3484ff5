"""A method of one's own is one file: a run is told its path, and nothing else is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streamopd.watch.journal import read

from .runs import SMALL, overrides, streamopd

MINE = '''"""Reverse KL where the teacher is sure, forward KL where it is not."""

from streamopd.slots import Branch, ForwardKL, Method, ReverseKL, TeacherEntropy, TeacherTop

MINE = Method(
    name="mine", summary="by the teacher's entropy", routing="exclusive",
    branches=(
        Branch(when=TeacherEntropy(above=0.5), loss=ForwardKL(), support=TeacherTop(8)),
        Branch(loss=ReverseKL()),
    ),
)
'''
TWO = ("teachers.second.model=asset:quickstart-teacher",)  # for a pool


def trained(folder: Path, method: str, *settings: str) -> list[dict[str, float]]:
    """The metrics of four steps of the quickstart's pair by a method."""
    small = [*SMALL, "learn.max_steps=4", f"method={method}", *settings]
    done = streamopd("run", "quickstart", "--in-process", "--out", str(folder), *overrides(*small))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "summary.json").read_text())["groups_trained"] > 0
    return [line["metrics"] for line in read(folder / "metrics.jsonl")]


def test_a_method_in_a_file_of_ones_own_trains(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    lines = trained(tmp_path / "run", f"{file}:MINE")
    assert len(lines) == 4
    assert all(line["grad_norm"] > 0 and 0 < line["overlap_ratio"] <= 1 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), [
    ("minillm", ()), ("deepseek_v4", TWO), ("stable_opd", ()), ("scope", ()), ("seqkd", ()), ("grpo", ()),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_method_of_each_kind_runs_from_question_to_weights(method: str, settings: tuple[str, ...], tmp_path: Path) -> None:
    lines = trained(tmp_path / "run", method, "group_size=4", "learn.groups_per_step=4", *settings)
    assert len(lines) == 4
    assert all(line["tokens"] > 0 for line in lines)
