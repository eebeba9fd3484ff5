"""Each service is killed or stopped once, mid-training: the run completes, accounts for every group, trains nothing twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from streamopd.watch.journal import read
from tests.run.runs import SMALL, accounts_are_exact, live_run, no_process_is_left, overrides, streamopd, summary

pytestmark = [pytest.mark.kill, pytest.mark.timeout(600)]


@pytest.mark.parametrize("service", ["feeder", "generator", "teacher", "packer", "learner", "broker"])
def test_a_run_survives_the_kill_of(service: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with live_run(folder, *SMALL) as live:
        live.wait(lambda: live.steps >= 15)
        os.kill(live.pid(service), signal.SIGKILL)
        found = live.end()
    assert (found["status"], found["steps"]) == ("completed", 60)
    accounts_are_exact(found)
    kinds = [event["kind"] for event in read(folder / "events.jsonl")]
    assert "restart" in kinds
    assert [line["n"] for line in read(folder / "metrics.jsonl")] == list(range(1, 61))
    no_process_is_left(folder)


def test_a_stopped_teacher_is_named_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with live_run(folder, *SMALL, "stream.lease_ttl_s=60.0") as live:
        live.wait(lambda: live.steps >= 10)
        teacher = live.pid("teacher")
        os.kill(teacher, signal.SIGSTOP)
        live.wait(lambda: "teacher-0" in (said := streamopd("status", str(folder)).stdout).splitlines()[0] and "no progress" in said)
        starved_at = live.steps
        assert live.steps == starved_at
        os.kill(teacher, signal.SIGCONT)
        found = live.end()
    assert found["status"] == "completed"
    accounts_are_exact(found)


def test_ctrl_c_drains_and_the_same_command_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with live_run(folder, *SMALL) as live:
        live.wait(lambda: live.steps >= 10)
        live.process.send_signal(signal.SIGINT)
        assert live.process.wait(60) == 130, live.words()
    stopped = summary(folder)
    assert stopped["status"] == "stopped"
    accounts_are_exact(stopped)
    no_process_is_left(folder)
    with live_run(folder, *SMALL) as live:
        found = live.end()
    assert (found["status"], found["steps"]) == ("completed", 60)
    accounts_are_exact(found)
    assert [line["n"] for line in read(folder / "metrics.jsonl")] == list(range(1, 61))


def test_a_killed_supervisor_leaves_no_process_and_the_run_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with live_run(folder, *SMALL) as live:
        live.wait(lambda: live.steps >= 15)
        live.process.kill()
        live.process.wait()
    with live_run(folder, *SMALL) as live:
        found = live.end()
    assert (found["status"], found["steps"]) == ("completed", 60)
    accounts_are_exact(found)
    no_process_is_left(folder)


def test_a_broker_whose_content_is_wiped_costs_time_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with live_run(folder, *SMALL) as live:
        live.wait(lambda: live.steps >= 15)
        broker = live.pid("broker")
        for file in (folder / "state" / "broker").glob("appendonlydir/*"):
            file.unlink()
        os.kill(broker, signal.SIGKILL)
        found = live.end()
    assert (found["status"], found["steps"]) == ("completed", 60)
    accounts_are_exact(found)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with live_run(folder, *SMALL) as live:
        live.wait(lambda: live.steps >= 1)
        second = streamopd("run", "quickstart", "--out", str(folder), *overrides(*SMALL))
        assert second.returncode == 2
        assert f"in use by process {live.process.pid}" in second.stderr
        live.process.send_signal(signal.SIGINT)
        live.process.wait(60)
