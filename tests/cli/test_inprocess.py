"""Services on one event loop: one failure ends all, and people can stop them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from streamopd.cli.inprocess import ORDER, run_in_process
from streamopd.errors import ConfigError, StreamopdError
from streamopd.worker import Run, Worker

from .conftest import MakeRun
from .fakes import idle, train, train_on_and_on

Main = Callable[[Run, Worker], Awaitable[None]]
Cast = Callable[..., None]


@pytest.fixture
def cast(monkeypatch: pytest.MonkeyPatch) -> Cast:
    """Give each service its part; who has none idles."""

    def give(**parts: Main) -> None:
        for service in (*ORDER, "evaluator"):
            monkeypatch.setitem(sys.modules, f"streamopd.services.{service}", SimpleNamespace(main=parts.get(service, idle)))

    return give


def status(run: Run) -> str:
    found: str = json.loads((run.folder / "summary.json").read_text())["status"]
    return found


def test_a_run_is_completed_and_then_only_shown(make_run: MakeRun, cast: Cast, capsys: pytest.CaptureFixture[str]) -> None:
    cast(learner=train)
    assert run_in_process(make_run()) == 0
    assert status(make_run()) == "completed"
    cast(learner=stumble)
    capsys.readouterr()
    assert run_in_process(make_run()) == 0
    assert "completed: " in capsys.readouterr().out


async def stumble(run: Run, worker: Worker) -> None:
    raise TypeError("a string is not a tensor")


async def refuse(run: Run, worker: Worker) -> None:
    raise ConfigError("Set it to 3.")


def test_a_fault_of_one_service_ends_the_others_and_is_told_without_its_trace(
    make_run: MakeRun, cast: Cast, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[str] = []

    async def wait(run: Run, worker: Worker) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(worker.service)

    run = make_run()
    (run.folder / "summary.json").write_text("an older one")
    cast(learner=wait, feeder=wait, packer=stumble)
    with pytest.raises(StreamopdError, match=r"packer failed\. TypeError: a string is not a tensor .*in-process\.log"):
        run_in_process(run)
    assert sorted(ended) == ["feeder", "learner"]
    assert status(run) == "failed"
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    assert "Traceback" in (run.folder / "logs" / "in-process.log").read_text()


def test_a_refusal_of_one_service_stays_a_refusal(make_run: MakeRun, cast: Cast) -> None:
    run = make_run()
    cast(teacher=refuse)
    with pytest.raises(ConfigError, match="Set it to 3"):
        run_in_process(run)
    assert status(run) == "failed"


def test_a_learner_that_leaves_without_a_last_word_is_a_failure(make_run: MakeRun, cast: Cast) -> None:
    async def leave(run: Run, worker: Worker) -> None:
        return

    cast(**dict.fromkeys(ORDER, leave))
    run = make_run()
    with pytest.raises(StreamopdError, match="no final checkpoint"):
        run_in_process(run)
    assert status(run) == "failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_the_run_after_the_step_in_hand_and_without_an_exam(make_run: MakeRun, cast: Cast, number: int) -> None:
    async def signal_then_train(run: Run, worker: Worker) -> None:
        os.kill(os.getpid(), number)
        await train_on_and_on(run, worker)

    async def examine_once_asked_to_leave(run: Run, worker: Worker) -> None:
        await worker.draining.wait()

    cast(learner=signal_then_train, evaluator=examine_once_asked_to_leave)
    run = make_run("evaluate.enabled=true")
    assert run_in_process(run) == 130
    assert status(run) == "stopped"
    assert (run.folder / "final" / "config.json").is_file()


def test_a_second_signal_does_not_wait(make_run: MakeRun, cast: Cast) -> None:
    async def signal_twice(run: Run, worker: Worker) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not run.stop_file.exists():
            await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    cast(learner=signal_twice)
    run = make_run()
    assert run_in_process(run) == 130
    assert status(run) == "stopped"
