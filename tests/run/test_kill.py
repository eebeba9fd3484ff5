"""Each service is killed or stopped once, mid-training: the run completes, accounts for every group, trains nothing twice."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streamopd.learn.checkpoint import load_newest
from streamopd.watch.journal import read
from tests.run.runs import SMALL, Live, accounts_are_exact, live_run, no_process_is_left, overrides, streamopd, summary

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


def test_a_run_survives_the_kill_of_its_evaluator(tmp_path: Path) -> None:
    folder, last = tmp_path / "run", 250
    settings = (*SMALL, "evaluate.enabled=true", "data.heldout_size=16", f"learn.max_steps={last}")
    with live_run(folder, *settings) as live:
        live.wait(lambda: bool(read(folder / "evaluations.jsonl")))
        os.kill(live.pid("evaluator"), signal.SIGKILL)
        assert live.steps < last, "the kill was to come in mid-training"
        found = live.end()
    assert (found["status"], found["steps"]) == ("completed", last)
    accounts_are_exact(found)
    assert any(event["kind"] == "restart" and "evaluator" in event["source"] for event in read(folder / "events.jsonl"))
    for who in ("before", "after", "teacher"):
        assert found["eval"]["accuracy_greedy"][who] is not None, found["eval"]
    no_process_is_left(folder)


def test_a_stopped_teacher_is_named_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with live_run(folder, *SMALL, "stream.lease_ttl_s=60.0") as live:
        live.wait(lambda: live.steps >= 10)
        teacher = live.pid("teacher")
        os.kill(teacher, signal.SIGSTOP)
        live.wait(lambda: quiet_s(live, "teacher-0") > 0)
        since_s, before = quiet_s(live, "teacher-0"), live.counters
        beyond_the_teacher = before.inflight["scored"] + before.inflight["batched"]
        live.wait(lambda: quiet_s(live, "teacher-0") > since_s + 5 and learner_starves(live))
        assert live.counters.steps <= before.steps + beyond_the_teacher // 16, "somebody scores while the only teacher is stopped"
        os.kill(teacher, signal.SIGCONT)
        found = live.end()
    assert (found["status"], found["steps"]) == ("completed", 60)
    accounts_are_exact(found)


def quiet_s(live: Live, instance: str) -> float:
    """For how long, as status opens with, an instance makes no progress; 0: status blames nobody, or another."""
    line = (live.status().splitlines() or [""])[0]
    found = re.search(r"no progress for (\d+) s", line)
    return float(found[1]) if found and instance in line else 0.0


def learner_starves(live: Live) -> bool:
    return bool(re.search(r"^learner\S* waits for batches", live.status(), re.MULTILINE))


def test_a_killed_learner_replays_its_steps_bit_for_bit(tmp_path: Path) -> None:
    """It dies far beyond its checkpoint; the next life, on the same batches, comes to the very weights that were out."""
    folder = tmp_path / "run"
    settings = (*SMALL, "learn.hold_fraction=1.0", "sync.keep_versions=100")  # a rate that does not ask for the last step
    with live_run(folder, *settings, "learn.save_steps=1000") as live:
        live.wait(lambda: live.steps >= 20)
        os.kill(live.process.pid, signal.SIGSTOP)  # it would start the learner again
        os.kill(live.pid("learner"), signal.SIGKILL)
        reached, losses = live.counters.steps, {line["n"]: line["metrics"]["loss"] for line in read(folder / "metrics.jsonl")}
        checkpoint = load_newest(folder / "state")
        live.kill_all()
    assert checkpoint is not None
    assert checkpoint.checkpoint.n == 0, "there is nothing to replay"
    published = load_file(folder / "weights" / f"weight_v{reached:06d}" / "model.safetensors")
    with live_run(folder, *settings, f"learn.save_steps={reached}", f"learn.max_steps={reached + 1}") as live:
        found = live.end()
    assert (found["status"], found["steps"]) == ("completed", reached + 1)
    accounts_are_exact(found)
    again = {line["n"]: line["metrics"]["loss"] for line in read(folder / "metrics.jsonl")}
    assert {n: again[n] for n in losses} == losses
    (replayed,) = (folder / "state").glob(f"ckpt-*-{reached}")
    state = load_file(replayed / "trainer.safetensors")
    assert set(published) == {name.removeprefix("param/") for name in state if name.startswith("param/")}
    for name, tensor in published.items():
        assert torch.equal(tensor, state[f"param/{name}"]), name


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
    no_process_is_left(folder, within_s=15)
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
