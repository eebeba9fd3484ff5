"""The supervisor over small real processes: who is started when, what a death costs, and how a run ends."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streamopd.cli import child, supervise
from streamopd.cli.supervise import Supervisor
from streamopd.errors import StreamopdError
from streamopd.stream.server import start_server
from streamopd.watch.journal import read
from streamopd.worker import Run

from .conftest import MakeRun
from .fakes import commands


class Small(Supervisor):
    """With as few processes as a test needs."""

    others: tuple[str, ...] = ()

    def _wanted(self) -> dict[str, int]:
        return {service: count for service, count in super()._wanted().items() if service in ("learner", "evaluator", *self.others)}


class WithGenerator(Small):
    others = ("generator",)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "TICK_S", 0.05)
    monkeypatch.setattr(child, "PAUSE_S", 0.05)


def status(run: Run) -> str:
    found: str = json.loads((run.folder / "summary.json").read_text())["status"]
    return found


def events(run: Run, *kinds: str) -> list[tuple[str, str]]:
    """(kind, service) in order."""
    return [(line["kind"], line["source"].split("-")[0]) for line in read(run.folder / "events.jsonl") if line["kind"] in kinds]


def test_a_closed_run_is_opened_by_its_learner_before_anybody_else_starts(make_run: MakeRun) -> None:
    assert WithGenerator(make_run(), commands(learner="train")).run() == 0
    run = make_run("learn.max_steps=4")
    (run.folder / "events.jsonl").unlink()
    assert WithGenerator(run, commands(learner="leave_once_then_train")).run() == 0
    told = events(run, "join", "opened", "restart")
    assert told[:4] == [("join", "learner"), ("restart", "learner"), ("join", "learner"), ("opened", "learner")]
    assert ("restart", "generator") not in told
    assert status(run) == "completed"


def test_a_completed_run_is_shown_and_nothing_starts(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    assert Small(run, commands(learner="train")).run() == 0
    before, joined = (run.folder / "summary.json").read_bytes(), events(run, "join")
    capsys.readouterr()
    assert Small(make_run(), commands(learner="die")).run() == 0
    assert "completed: " in capsys.readouterr().out
    assert (run.folder / "summary.json").read_bytes() == before
    assert events(run, "join") == joined


def test_an_evaluator_that_dies_after_the_end_is_started_again_to_see_it(make_run: MakeRun) -> None:
    run = make_run("evaluate.enabled=true")
    assert Small(run, commands(learner="train", evaluator="die_then_examine")).run() == 0
    assert events(run, "restart", "examined") == [("restart", "evaluator"), ("examined", "evaluator")]
    assert status(run) == "completed"


def test_an_evaluator_that_makes_no_progress_after_the_end_is_killed_and_started_again(make_run: MakeRun) -> None:
    run = make_run("evaluate.enabled=true")
    supervisor = Small(run, lambda *_: ["sleep", "1000"])
    assert supervisor._tend_exam()
    hung = supervisor.evaluator
    assert hung
    process = hung.process
    assert process
    hung.moved_s -= supervise.STALL_S
    assert supervisor._tend_exam()
    assert process.wait() == -signal.SIGKILL
    assert supervisor._tend_exam(), "a killed one is waited for"
    hung.start_after_s = 0.0
    assert supervisor._tend_exam()
    assert hung.alive
    supervisor._kill_all()
    assert events(run, "stall", "restart") == [("stall", "evaluator"), ("restart", "evaluator")]


class Patient(Small):
    """Its evaluator has waited for the end for a very long time."""

    def _learner_is_done(self) -> bool:
        assert self.evaluator
        self.evaluator.moved_s = -1e9
        return super()._learner_is_done()


def test_waiting_for_the_end_is_no_stall(make_run: MakeRun) -> None:
    run = make_run("evaluate.enabled=true")
    assert Patient(run, commands(learner="train_slowly", evaluator="examine")).run() == 0
    assert events(run, "stall", "restart", "examined") == [("examined", "evaluator")]


def test_a_run_whose_evaluator_cannot_see_the_end_has_failed(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "MAX_RESTARTS", 1)
    run = make_run("evaluate.enabled=true")
    with pytest.raises(StreamopdError, match=r"evaluator-0 died 2 times without a step.*no such luck.*evaluator-0\.log"):
        Small(run, commands(learner="train", evaluator="die")).run()
    assert status(run) == "failed"


def test_a_service_that_only_dies_ends_the_run_though_others_work(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "MAX_RESTARTS", 1)
    monkeypatch.setattr(supervise, "FAILED_S", 0.1)
    run = make_run()
    with pytest.raises(StreamopdError, match="generator-0 died 2 times within 5 minutes, and did no work"):
        WithGenerator(run, commands(learner="train_on_and_on", generator="die")).run()
    assert status(run) == "failed"


@pytest.mark.parametrize("log", ["a file", "/dev/full"])
def test_a_refusal_of_a_service_ends_the_run_in_its_words_wherever_it_can_say_them(make_run: MakeRun, log: str) -> None:
    run = make_run()
    if log == "/dev/full":
        (run.folder / "logs" / "learner-0.log").symlink_to(log)
    with pytest.raises(StreamopdError, match=r"^learner-0 gave up\. The disk is full\.\s+Make room\.$"):
        Small(run, commands(learner="refuse")).run()
    assert status(run) == "failed"
    assert events(run, "restart") == []


@pytest.mark.parametrize(("times", "exam_s"), [("once", 0.2), ("twice", 1e6)])
def test_ctrl_c_ends_an_exam_soon_and_twice_at_once(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, times: str, exam_s: float
) -> None:
    monkeypatch.setattr(supervise, "EXAM_S", exam_s)
    run = make_run("evaluate.enabled=true")
    assert Small(run, commands(learner="train", evaluator=f"interrupt_{times}")).run() == 130
    assert status(run) == "stopped"


def test_a_closed_terminal_stops_the_run_after_the_step_in_hand(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise.signal, "getsignal", lambda number: signal.SIG_DFL)  # these tests may run under nohup
    run = make_run()
    assert Small(run, commands(learner="hang_up_twice")).run() == 130
    assert status(run) == "stopped"
    assert (run.folder / "final" / "config.json").is_file()


def test_a_broker_that_is_lost_for_good_fails_the_run_with_its_reason(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = start_server(tmp_path / "foreign")
    monkeypatch.setattr(supervise, "PATIENCE_S", 0.3)
    monkeypatch.setenv("BROKER_PASSWORD", server.password)
    monkeypatch.setenv("BROKER_PID", str(server.pid))
    run = make_run(f"redis.url={server.url}", "redis.password_env=BROKER_PASSWORD")
    (run.folder / "summary.json").write_text("an older one")
    try:
        with pytest.raises(StreamopdError, match=r"The broker was lost: .*valkey\.sock.*did not answer"):
            Small(run, commands(learner="kill_the_broker")).run()
    finally:
        server.stop()
    assert status(run) == "failed"


SUPERVISED = """
import sys
from pathlib import Path
from streamopd.worker import Run
from tests.cli.fakes import commands
from tests.cli.test_supervise import Small
Small(Run.open(Path(sys.argv[1])), commands(learner="train_on_and_on")).run()
"""


def test_nothing_outlives_a_killed_supervisor_not_even_a_restarted_broker(make_run: MakeRun) -> None:
    run = make_run()
    (run.folder / "summary.json").write_text("an older one")
    process = subprocess.Popen([sys.executable, "-c", SUPERVISED, str(run.folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        await_line(process, "opened:")
        os.kill(child_of(process.pid, "valkey"), signal.SIGKILL)
        await_line(process, "restart: the broker ended")
        left = [os.pidfd_open(child_of(process.pid, what)) for what in ("valkey", "tests.cli.fakes")]
    finally:
        process.kill()
        process.communicate()
    for descriptor in left:
        assert select.select([descriptor], [], [], 10)[0], "it lives on"
        os.close(descriptor)
    assert not (run.folder / "summary.json").exists(), "it speaks of a run before"


def await_line(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout
    assert any(words in line for line in process.stdout), f"it ended before it said {words!r}"


def child_of(pid: int, word: str) -> int:
    """The one child of `pid` with `word` on its command line."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    (found,) = [child for child in children if word in Path(f"/proc/{child}/cmdline").read_text()]
    return found
