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


PATIENT = """
from streamopd.slots import Branch, Coin, Likelihood, Method, Plateau, ReverseKL, Stage

MINE = Method(name="mine", summary="the dataset's answers until they teach no more, then the student's own", stages=(
    Stage(until=0.9, plateau=Plateau(window=1, change=1e9), behaviour=Coin(student=0.0, author="gold"),
          branches=(Branch(loss=Likelihood()),)),
    Stage(until=1.0, branches=(Branch(loss=ReverseKL()),)),
))
"""


def test_a_plateau_ends_a_stage_for_the_learner_and_for_those_who_write(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PATIENT)
    lines = trained(tmp_path / "run", f"{file}:MINE", "max_staleness=0")
    assert [line["stage"] for line in lines] == [0, 0, 1, 1]
    assert ["completion_length" in line for line in lines] == [False, False, True, True]  # a figure of the student's own answers


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), [
    ("minillm", ()), ("deepseek_v4", TWO), ("stable_opd", ()), ("scope", ()), ("seqkd", ()), ("grpo", ()),
    ("gkd_gold", ("group_size=1",)), ("sft_gold", ("group_size=1",)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_method_of_each_kind_runs_from_question_to_weights(method: str, settings: tuple[str, ...], tmp_path: Path) -> None:
    lines = trained(tmp_path / "run", method, "group_size=4", "learn.groups_per_step=4", *settings)
    assert len(lines) == 4
    assert all(line["tokens"] > 0 for line in lines)
