"""What is wrong is said in one paragraph, before anything starts, with an exit code that tells the truth."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.run.runs import no_process_is_left, overrides, streamopd


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["learn.max_step=1"], "Unknown key learn.max_step. Did you mean learn.max_steps?"),
        (["student.model=nowhere"], "nowhere"),
        (["teachers.default.model=asset:quickstart-techer"], "asset:quickstart-teacher"),
        (["data.train=chain-summ"], "chain-sum"),
        (["data.train=missing.jsonl", "data.options={}"], "missing.jsonl"),
        (["method=defualt"], "Did you mean 'default'?"),
        (["data.grader=wrong"], "wrong"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(tmp_path: Path, settings: list[str], sentence: str) -> None:
    answer = streamopd("run", "quickstart", "--out", str(tmp_path / "run"), *overrides(*settings))
    assert answer.returncode == 2, answer
    assert sentence in answer.stderr
    assert "Traceback" not in answer.stderr
    no_process_is_left(tmp_path)


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    answer = streamopd("run", "quickstart", "--out", str(tmp_path / "run"), *overrides(f"data.train={tmp_path / 'empty.jsonl'}", "data.options={}"))
    assert answer.returncode == 2
    assert "empty.jsonl" in answer.stderr


def test_an_unreachable_broker_is_named_with_its_address(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        answer = streamopd("run", "quickstart", "--out", str(tmp_path / "run"), *overrides(f"redis.url=redis://127.0.0.1:{port}"))
    assert answer.returncode == 2
    assert str(port) in answer.stderr
    assert "Traceback" not in answer.stderr
    no_process_is_left(tmp_path)


def test_debug_shows_the_trace(tmp_path: Path) -> None:
    answer = streamopd("--debug", "run", str(tmp_path / "nowhere.toml"))
    assert answer.returncode == 2
    assert "Traceback" in answer.stderr


def test_a_status_of_no_run_says_what_to_do(tmp_path: Path) -> None:
    answer = streamopd("status", str(tmp_path))
    assert answer.returncode == 2
    assert "holds no run" in answer.stderr
