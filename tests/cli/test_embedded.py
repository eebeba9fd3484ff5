"""The broker of a run under the supervisor: started again when it dies, and given up with its last words."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from streamopd.cli import child
from streamopd.cli.child import MAX_RESTARTS
from streamopd.cli.embedded import EmbeddedBroker
from streamopd.errors import StreamError, StreamopdError

from .conftest import MakeRun


def kill(broker: EmbeddedBroker) -> None:
    assert broker.server
    assert broker.server.process
    os.kill(broker.server.pid, signal.SIGKILL)
    broker.server.process.wait()


def test_a_broker_that_dies_is_started_at_the_same_address(make_run: MakeRun) -> None:
    run = make_run()
    broker = EmbeddedBroker(run)
    broker.start()
    try:
        address = run.address()
        assert not broker.tend(steps=0)
        kill(broker)
        assert broker.tend(steps=0)
        assert run.address() == address
        assert broker.server
        assert broker.server.running()
    finally:
        broker.stop()


def test_a_broker_that_cannot_be_started_again_is_given_up_with_its_last_words(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "PAUSE_S", 0.0)
    broker = EmbeddedBroker(make_run())
    broker.start()
    kill(broker)
    for file in Path(broker.folder / "appendonlydir").glob("*.manifest"):
        file.write_text("not a manifest\n")
    for _ in range(MAX_RESTARTS):
        with pytest.raises(StreamError, match="could not be started again"):
            broker.tend(steps=0)
    with pytest.raises(StreamopdError, match=r"(?s)died 6 times without a step.*Invalid AOF manifest") as given_up:
        broker.tend(steps=0)
    assert not isinstance(given_up.value, StreamError)


def test_a_run_with_a_broker_of_its_own_has_none_here(make_run: MakeRun) -> None:
    run = make_run("redis.url=redis://somewhere:1")
    broker = EmbeddedBroker(run)
    broker.start()
    assert not broker.tend(steps=0)
    broker.stop()
    assert not broker.folder.exists()
