"""The watch over services that somebody else starts: here, small real processes under a test that plays a restart policy."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from redis.exceptions import ConnectionError

from streamopd.cli import attend
from streamopd.cli.attend import Attendant
from streamopd.cli.credentials import ACL, write_secrets
from streamopd.cli.run import run_here
from streamopd.errors import ConfigError, StreamopdError
from streamopd.worker import Run
from tests.stream.test_server import foreign

from .conftest import MakeRun
from .fakes import commands
from .test_supervise import events, status


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("TICK_S", 0.05), ("QUIET_S", 1.5), ("LEAVE_S", 20.0)):
        monkeypatch.setattr(attend, name, seconds)


@pytest.fixture
def make_attended(make_run: MakeRun, tmp_path: Path) -> Iterator[MakeRun]:
    """Runs whose broker is somebody else's, with a user for each service."""
    write_secrets(tmp_path / "secrets")
    with foreign(tmp_path / "server", "--aclfile", str(tmp_path / "secrets" / ACL)) as url:
        yield lambda *more: make_run(f"redis.url={url}", f"redis.credentials_file={tmp_path}/secrets/{{service}}", *more)


@contextmanager
def policy(run: Run, **acts: str) -> Iterator[list[int]]:
    """Start services, and again whoever does not end with 0; the exit codes that were seen."""
    codes: list[int] = []

    def keep(command: list[str]) -> None:
        while True:
            codes.append(subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode)
            if codes[-1] == 0:
                return

    keepers = [threading.Thread(target=keep, args=(commands(**acts)(run.folder, service, service),)) for service in acts]
    for keeper in keepers:
        keeper.start()
    try:
        yield codes
    finally:
        for keeper in keepers:
            keeper.join(60)
            assert not keeper.is_alive(), "a service is still there after the end of its run"


def wait_until_gone(socket: Path) -> None:
    """A server that was told to end takes a moment on a busy machine."""
    deadline_s = time.monotonic() + 20
    with redis.Redis(unix_socket_path=str(socket), retry=None) as client:
        while time.monotonic() < deadline_s:
            try:
                client.ping()
            except ConnectionError:
                return
            time.sleep(0.05)
    raise AssertionError(f"the server at {socket} still answers")


def test_a_run_is_watched_to_its_end_and_everybody_leaves_with_0(make_attended: MakeRun) -> None:
    run = make_attended()
    with policy(run, learner="train", generator="idle") as codes:
        assert Attendant(run, stop_broker=False).run() == 0
    assert codes == [0, 0]
    assert status(run) == "completed"
    assert run.over_file.read_text() == "completed"


def test_a_service_that_comes_after_the_end_leaves_though_the_broker_is_gone(make_attended: MakeRun, tmp_path: Path) -> None:
    run = make_attended()
    with policy(run, learner="train"):
        assert Attendant(run, stop_broker=True).run() == 0
    wait_until_gone(tmp_path / "server" / "s")
    with policy(run, generator="idle") as codes:
        pass
    assert codes == [0]


def test_a_completed_run_is_told_again_and_not_begun_again(make_attended: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_attended()
    with policy(run, learner="train"):
        assert Attendant(run, stop_broker=False).run() == 0
    before = (run.folder / "summary.json").read_bytes()
    capsys.readouterr()
    assert Attendant(make_attended(), stop_broker=False).run() == 0
    assert "completed: " in capsys.readouterr().out
    assert (run.folder / "summary.json").read_bytes() == before


def test_a_refusal_ends_the_run_with_its_sentence_and_nobody_is_started_for_ever(make_attended: MakeRun) -> None:
    run = make_attended()
    refused = pytest.raises(StreamopdError, match=r"teacher.* gave up\. The disk is full\.")
    with policy(run, teacher="refuse", generator="idle") as codes, refused:
        Attendant(run, stop_broker=False).run()
    assert codes.count(0) == 2
    assert status(run) == "failed"
    with pytest.raises(StreamopdError, match=r"The run has failed: teacher"):
        Attendant(make_attended(), stop_broker=False).run()


def test_a_service_that_only_dies_ends_the_run(make_attended: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamopd.cli.child.MAX_RESTARTS", 1)
    run = make_attended()
    with policy(run, generator="die"), pytest.raises(StreamopdError, match=r"The generator died 2 times.*no such luck"):
        Attendant(run, stop_broker=False).run()
    assert events(run, "failure")[:2] == [("failure", "generator")] * 2


def test_a_service_that_nobody_starts_is_missed_by_name(make_attended: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "ABSENT_S", 0.5)
    run = make_attended()
    with pytest.raises(StreamopdError, match=r"No feeder has shown a sign of life for \d+ s.*streamopd feeder"):
        Attendant(run, stop_broker=False).run()


def test_to_attend_takes_a_broker_that_others_can_reach(tmp_path: Path) -> None:
    from streamopd.cli.run import run_here

    with pytest.raises(ConfigError, match=r"--attend.*redis\.url is not set"):
        run_here("quickstart", [], tmp_path, in_process=False, attend=True, stop_redis=False, fresh=False)


def test_a_service_that_is_only_killed_ends_the_run_too(make_attended: MakeRun) -> None:
    run = make_attended()
    died = pytest.raises(StreamopdError, match=r"The teacher died 6 times.*it was killed, or had too little memory")
    with policy(run, teacher="be_killed", generator="idle") as codes, died:
        Attendant(run, stop_broker=False).run()
    assert codes.count(-9) >= 6
    assert codes[-1] == 0
    assert status(run) == "failed"


def test_an_end_that_was_cut_short_is_made_again(make_attended: MakeRun, tmp_path: Path) -> None:
    run = make_attended()
    run.over_file.write_text("failed: it would not do")  # killed between this and the end of the broker
    with pytest.raises(StreamopdError, match=r"The run has failed: it would not do"):
        Attendant(run, stop_broker=True).run()
    wait_until_gone(tmp_path / "server" / "s")


def test_an_attended_run_does_not_begin_anew_at_every_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--fresh empties the folder at every start"):
        run_here("quickstart", ["redis.url=redis://x"], tmp_path / "run", in_process=False, attend=True, stop_redis=False, fresh=True)
