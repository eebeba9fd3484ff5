"""A composed run seen from the host: its containers, its run folder, and signals to the first process of a container."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from streamopd.watch.journal import read

from .engine import Engine

ROOT = Path(__file__).parent.parent.parent
CLOSED_NET = "tests/compose/closed-net.yml"
RUN = "quickstart"


class Project:
    """`docker compose` in a clone of the project; `settings` are environment variables of the compose file."""

    def __init__(self, engine: Engine, wheels: Path, folder: Path, overlays: Sequence[str], settings: dict[str, str]) -> None:
        self.engine, self.folder = engine, folder
        self.files = [word for file in ("docker-compose.yml", *overlays, CLOSED_NET) for word in ("-f", file)]
        self.name = f"test{os.getpid()}{folder.parent.name[-8:]}{folder.name[-1]}".lower().replace("_", "")
        self.environment = {**engine.environment, "WHEELHOUSE": str(wheels), **settings}

    @property
    def run(self) -> Path:
        return self.folder / "runs" / RUN

    def compose(self, *words: str, check: bool = True, timeout_s: float = 600.0) -> str:
        """stdout and stderr of `docker compose …`."""
        done = subprocess.run(
            ["docker", "compose", "--ansi", "never", "--progress", "quiet", "-p", self.name, *self.files, *words], cwd=self.folder,
            env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s, check=False,
        )
        assert not check or done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout[-4000:]}"
        return done.stdout

    def up(self, *words: str) -> str:
        """In the foreground until every container has ended, or with -d."""
        return self.compose("up", *words)

    # ---------------------------------------------------------------- containers
    def containers(self, service: str) -> list[str]:
        """Ids of those that run, oldest first."""
        ids = self.compose("ps", "-q", service).split()
        return sorted(ids, key=lambda id_: self.inspect(id_, "{{.Created}}"))

    def inspect(self, container: str, form: str) -> str:
        return self.engine.docker("inspect", "-f", form, container).strip()

    def exit_code(self, service: str) -> int:
        (container,) = self.compose("ps", "-aq", service).split()
        return int(self.inspect(container, "{{.State.ExitCode}}"))

    def restarts(self) -> dict[str, int]:
        """Restarts of every container there is, by name."""
        ids = self.compose("ps", "-aq").split()
        return {self.inspect(id_, "{{.Name}}"): int(self.inspect(id_, "{{.RestartCount}}")) for id_ in ids}

    def crash(self, service: str) -> None:
        """SIGKILL to the first process of its container from the host: what a restart policy sees as a crash."""
        (container, *_) = self.containers(service)
        before = self.inspect(container, "{{.RestartCount}}")
        os.kill(int(self.inspect(container, "{{.State.Pid}}")), signal.SIGKILL)
        self.wait(lambda: self.inspect(container, "{{.RestartCount}}") != before, f"a restart of {service}")

    def execute(self, service: str, *words: str) -> subprocess.CompletedProcess[str]:
        """A command inside a running container, as its own user."""
        command = ["docker", "compose", "-p", self.name, *self.files, "exec", "-T", service, *words]
        return subprocess.run(command, cwd=self.folder, env=self.environment, text=True, capture_output=True, timeout=120, check=False)

    # ---------------------------------------------------------------- the run
    @property
    def steps(self) -> int:
        return max((line["n"] for line in read(self.run / "metrics.jsonl")), default=0)

    @property
    def events(self) -> list[dict[str, Any]]:
        return list(read(self.run / "events.jsonl"))

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "summary.json").read_text())
        return found

    def wait(self, holds: Callable[[], bool], what: str, timeout_s: float = 180.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline_s, f"no {what} within {timeout_s:.0f} s; step {self.steps}\n{self._words()}"
            time.sleep(0.2)

    def wait_steps(self, steps: int) -> None:
        self.wait(lambda: self.steps >= steps, f"step {steps}")

    def end(self, timeout_s: float = 400.0) -> dict[str, Any]:
        """The summary, once every container of a run in the background has ended."""
        self.wait(lambda: not self.compose("ps", "-q").split(), "end", timeout_s)
        assert self.exit_code("supervisor") == 0, self._words()
        return self.summary

    def _words(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "15", check=False)[-6000:]
