"""Real runs for tests: `streamopd run` in a process of its own, watched from outside."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from streamopd.stream import Counters
from streamopd.watch.journal import read
from streamopd.worker import Run

# Small enough for a test, the same journey: 16 groups a step, no evaluation.
SMALL = ("learn.groups_per_step=16", "generator.max_inflight=16", "learn.max_steps=60", "learn.save_steps=10",
         "evaluate.enabled=false", "stream.lease_ttl_s=3.0")
MARK = {"STARTED_BY_TESTS_OF": str(os.getpid())}  # inherited: a helper whose command line names no folder is known by it
COMMAND = (sys.executable, "-m", "streamopd")


def streamopd(*words: str, timeout_s: float = 300.0, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The command, to its end; `before` it may stand another that starts it."""
    return subprocess.run(
        [*before, *COMMAND, *words], capture_output=True, text=True, timeout=timeout_s, env=os.environ | MARK, check=False
    )


def overrides(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("-s", setting)]


class Live:
    """A run that is going on."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder, self.process = folder, process

    @property
    def steps(self) -> int:
        return max((line["n"] for line in read(self.folder / "metrics.jsonl")), default=0)

    @property
    def counters(self) -> Counters:
        """What the broker says."""
        return asyncio.run(_counters(self.folder))

    def status(self) -> str:
        """What `streamopd status` says."""
        return streamopd("status", str(self.folder)).stdout

    def pid(self, service: str) -> int:
        """The process of a service, or of the embedded broker."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            command = child.cmdline()
            if service in command or (service == "broker" and any("valkey" in word for word in command)):
                return child.pid
        raise AssertionError(f"no process of {service} under {self.process.pid}")

    def kill_all(self) -> None:
        """The power goes: every process ends at once."""
        self.process.kill()
        self.process.wait()
        _end(processes_of(self.folder))

    def wait(self, holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Until `holds`, while the run goes on."""
        deadline_s = time.monotonic() + timeout_s
        while not holds():
            assert self.process.poll() is None, f"the run ended with {self.process.returncode}: {self.words()}"
            assert time.monotonic() < deadline_s, f"not within {timeout_s} s; the run is at step {self.steps}:\n{self.status()}"
            time.sleep(0.05)

    def end(self, timeout_s: float = 240.0) -> dict[str, Any]:
        """summary.json, once the run is over."""
        self.process.wait(timeout_s)
        assert self.process.returncode == 0, self.words()
        return summary(self.folder)

    def words(self) -> str:
        return (self.folder.parent / "out.txt").read_text()[-2000:]


@contextmanager
def live_run(folder: Path, *settings: str, recipe: str = "quickstart") -> Iterator[Live]:
    """A run in the background; whatever is left of it is killed at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "out.txt").open("w") as out:
        command = [*COMMAND, "run", recipe, "--out", str(folder), *overrides(*settings)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True, env=os.environ | MARK)
    live, over = Live(folder, process), False
    try:
        yield live
        over = process.poll() is not None
    finally:
        if not over:  # what a failed test leaves must not trouble the next one
            live.kill_all()


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def accounts_are_exact(found: dict[str, Any]) -> None:
    """Every group has one fate, and none was trained twice."""
    assert found["groups_fed"] == found["groups_trained"] + sum(found["groups_dropped"].values()), found
    assert found["duplicate_trainings"] == 0, found


def no_process_is_left(folder: Path, within_s: float = 0.0) -> None:
    """Nothing still runs on this folder, and nothing that a run of these tests began."""
    deadline = time.monotonic() + within_s
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    told = [process.as_dict(["pid", "ppid", "status", "cmdline", "cwd"]) for process in left]
    _end(left)
    assert not told, told


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those that name the folder, work in it, or were begun by a run of these tests."""
    others = (process for process in psutil.process_iter() if process.pid != os.getpid())
    return [process for process in others if _is_of(process, folder)]


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def _is_of(process: psutil.Process, folder: Path) -> bool:
    try:
        marked = process.environ().items() >= MARK.items()
        return marked or str(folder) in " ".join(process.cmdline()) or Path(process.cwd()).is_relative_to(folder)
    except psutil.Error:  # gone meanwhile, a zombie, or not ours to ask
        return False


async def _counters(folder: Path) -> Counters:
    broker = await Run.open(folder).connect()
    try:
        return await broker.counters()
    finally:
        await broker.close_connection()
