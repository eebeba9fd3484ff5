"""Real runs for tests: `streamopd run` in a process of its own, watched from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from streamopd.watch.journal import read

# Small enough for a test, the same journey: 16 groups a step, no evaluation.
SMALL = ("learn.groups_per_step=16", "generator.max_inflight=16", "learn.max_steps=60", "learn.save_steps=10",
         "evaluate.enabled=false", "stream.lease_ttl_s=3.0")


def streamopd(*words: str, timeout_s: float = 300.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "streamopd", *words], capture_output=True, text=True, timeout=timeout_s,
        env=os.environ | environment, check=False,
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

    def pid(self, service: str) -> int:
        """The process of a service, or of the embedded broker."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            command = child.cmdline()
            if service in command or (service == "broker" and any("valkey" in word for word in command)):
                return child.pid
        raise AssertionError(f"no process of {service} under {self.process.pid}")

    def wait(self, holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Until `holds`, while the run goes on."""
        deadline_s = time.monotonic() + timeout_s
        while not holds():
            assert self.process.poll() is None, f"the run ended with {self.process.returncode}: {self.words()}"
            assert time.monotonic() < deadline_s, f"not within {timeout_s} s; the run is at step {self.steps}"
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
        command = [sys.executable, "-m", "streamopd", "run", recipe, "--out", str(folder), *overrides(*settings)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True)
    try:
        yield Live(folder, process)
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            psutil.wait_procs(family, timeout=10)


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def accounts_are_exact(found: dict[str, Any]) -> None:
    """Every group has one fate, and none was trained twice."""
    assert found["groups_fed"] == found["groups_trained"] + sum(found["groups_dropped"].values()), found
    assert found["duplicate_trainings"] == 0, found


def no_process_is_left(folder: Path) -> None:
    """Nothing still runs on this folder."""
    left = [p.info for p in psutil.process_iter(["pid", "cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or ())]
    assert not left, left
