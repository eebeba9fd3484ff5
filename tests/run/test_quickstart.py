"""The quickstart to its end, and what it left checked from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from streamopd.watch.journal import read
from tests.run.outside import fresh_problems, greedy_accuracy, replayed_logprobs
from tests.run.runs import accounts_are_exact, no_process_is_left, overrides, streamopd, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SUMMARY_FIELDS = [
    "status", "steps", "groups_fed", "groups_trained", "groups_dropped", "duplicate_trainings", "tokens_generated", "tokens_trained",
    "wall_s", "startup_s", "age_steps", "swaps", "learner_idle_fraction", "eval", "kl_heldout", "peak_rss_mb",
]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    answer = streamopd("run", "quickstart", "--out", str(folder), timeout_s=800)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def found(quickstart: Path) -> dict[str, Any]:
    return summary(quickstart)


def test_it_learns_what_its_teacher_knows(found: dict[str, Any]) -> None:
    accuracy = found["eval"]["accuracy_greedy"]
    assert found["status"] == "completed"
    assert accuracy["before"] <= 0.30
    assert accuracy["teacher"] >= 0.97
    assert accuracy["after"] >= 0.95 * accuracy["teacher"]
    assert found["kl_heldout"]["after"] < found["kl_heldout"]["before"] / 4


def test_the_account_is_exact_and_the_fields_are_the_stable_ones(found: dict[str, Any], quickstart: Path) -> None:
    assert list(found) == SUMMARY_FIELDS
    accounts_are_exact(found)
    assert found["steps"] == 500
    assert found["groups_trained"] == 500 * 64
    no_process_is_left(quickstart)


def test_weights_changed_in_flight(found: dict[str, Any], quickstart: Path) -> None:
    assert found["swaps"]["count"] >= 100
    assert found["swaps"]["in_flight"] >= 1
    assert any(len(sample["weight_spans"]) >= 2 for sample in read(quickstart / "samples.jsonl"))


def test_plain_transformers_confirms_the_accuracy_on_fresh_problems(found: dict[str, Any], quickstart: Path) -> None:
    accuracy = greedy_accuracy(quickstart / "final", fresh_problems(500, seed=20_261_124))
    assert accuracy == pytest.approx(found["eval"]["accuracy_greedy"]["after"], abs=0.03)


@pytest.mark.parametrize("spans", [1, 2])
def test_recorded_logprobs_are_those_of_the_versions_they_name(quickstart: Path, spans: int) -> None:
    kept = {int(folder.name.removeprefix("weight_v")) for folder in (quickstart / "weights").glob("weight_v*")}
    samples = [
        sample for sample in read(quickstart / "samples.jsonl")
        if len(sample["weight_spans"]) == spans and {version for _, version, _ in sample["weight_spans"]} <= kept
    ]
    assert samples, f"no sample of {spans} versions among {sorted(kept)}"
    for sample in samples[-12:]:
        replayed = replayed_logprobs(sample, quickstart / "weights")
        assert torch.allclose(replayed, torch.tensor(sample["logprobs"]), atol=1e-4), sample["rollout"]


def test_the_report_and_the_last_four_versions_are_there(quickstart: Path) -> None:
    assert "<svg" in (quickstart / "report.html").read_text()
    versions = sorted(int(folder.name.removeprefix("weight_v")) for folder in (quickstart / "weights").glob("weight_v*"))
    assert versions[-4:] == [497, 498, 499, 500]


def test_running_a_completed_run_again_changes_nothing(quickstart: Path) -> None:
    before = (quickstart / "metrics.jsonl").read_bytes()
    answer = streamopd("run", "quickstart", "--out", str(quickstart))
    assert answer.returncode == 0
    assert "completed" in answer.stdout
    assert (quickstart / "metrics.jsonl").read_bytes() == before


def test_without_a_learning_rate_nothing_is_learnt(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    answer = streamopd("run", "quickstart", "--out", str(folder), *overrides("learn.lr=0", "learn.max_steps=40"))
    assert answer.returncode == 0, answer.stderr
    accuracy = summary(folder)["eval"]["accuracy_greedy"]
    assert accuracy["after"] == pytest.approx(accuracy["before"], abs=0.03)


def test_an_untrained_teacher_gives_no_better_student(tmp_path: Path, untrained_teacher: Path) -> None:
    folder = tmp_path / "run"
    settings = overrides(f"teachers.default.model={untrained_teacher}", "learn.max_steps=60")
    answer = streamopd("run", "quickstart", "--out", str(folder), *settings)
    assert answer.returncode == 0, answer.stderr
    accuracy = summary(folder)["eval"]["accuracy_greedy"]
    assert accuracy["after"] <= accuracy["before"] + 0.03


@pytest.fixture
def untrained_teacher(tmp_path: Path) -> Path:
    """The teacher's architecture with random weights."""
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    from streamopd.assets import resolve

    source, folder = resolve("asset:quickstart-teacher"), tmp_path / "untrained"
    shutil.copytree(source, folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(folder)
    return folder
