"""One service process of a run: how it starts, whether it moves, and how often it died."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

from streamopd.schemas import Heartbeat
from streamopd.watch.metrics import ADDRESS_ENV

MAX_RESTARTS = 5
WINDOW_S = 300.0
PAUSE_S = 0.5      # before the second start; doubled for each death in a row
OPENING_MOVES = 3  # progress that a service makes by opening its models: a life that did no more has done no work

PR_SET_PDEATHSIG = 1

Command = Callable[[Path, str, str], list[str]]


def service_command(folder: Path, service: str, name: str) -> list[str]:
    """What starts a service of the run in `folder`."""
    return [sys.executable, "-m", "streamopd", service, str(folder), "--instance", name]


def tied(number: int) -> Callable[[], None]:
    """For a new process, before it executes: signal `number` ends it when this one ends, however that ends (Linux).

    The tie is to the thread that starts the process, so that must be one that lives as long as this process: the main one.
    """
    parent, library = os.getpid(), ctypes.CDLL(None) if sys.platform == "linux" else None

    def tie() -> None:
        if library is not None:
            library.prctl(PR_SET_PDEATHSIG, number)
            if os.getppid() != parent:  # it ended before the tie was made
                os.kill(os.getpid(), number)

    return tie


class Deaths:
    """Deaths of one process under two rules. Either alone can be too many: others may work on beside one that cannot."""

    def __init__(self) -> None:
        self._steps = -1
        self._stepless = 0               # in a row, while the run did no step
        self._idle_s: list[float] = []   # when, of those since a life did work of its own

    def note(self, steps: int, worked: bool, now_s: float) -> None:
        """One more, at step `steps`; `worked`: this life did something before it ended."""
        self._stepless = self._stepless + 1 if steps == self._steps else 1
        self._steps = steps
        self._idle_s = [] if worked else [*(s for s in self._idle_s if s > now_s - WINDOW_S), now_s]

    @property
    def counted(self) -> int:
        """By the stricter rule."""
        return max(self._stepless, len(self._idle_s))

    @property
    def pause_s(self) -> float:
        """Before the next start."""
        return float(min(16 * PAUSE_S, PAUSE_S * 2 ** (self.counted - 1)))

    @property
    def too_many(self) -> str:
        """Why there are too many; "" while there are not."""
        if self._stepless > MAX_RESTARTS:
            return f"{self._stepless} times without a step in between"
        if len(self._idle_s) > MAX_RESTARTS:
            return f"{len(self._idle_s)} times within {WINDOW_S / 60:.0f} minutes, and did no work in between"
        return ""


def _environment() -> dict[str, str]:
    """Of a child: what this process has, but for the one address at which this process shows its figures."""
    return {name: value for name, value in os.environ.items() if name != ADDRESS_ENV}


class Child:
    """A process that is started, watched, and started again. `process` is None while a start is due."""

    def __init__(self, service: str, name: str, command: Sequence[str], log_path: Path) -> None:
        self.service, self.name, self.command, self.log_path = service, name, command, log_path
        self.process: subprocess.Popen[bytes] | None = None
        self.deaths = Deaths()
        self.start_after_s = 0.0  # time.monotonic()
        self.progress = 0         # of this life, by its heartbeats
        self.moved_s = 0.0        # when that moved last; time.monotonic()

    def start(self) -> None:
        """Call it in the main thread. The child is tied by SIGKILL, as the broker is gone as well: there is nowhere to drain to."""
        log: IO[bytes]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=tied(signal.SIGKILL), env=_environment(),
            )
        self.progress, self.moved_s = 0, time.monotonic()

    def code(self) -> int | None:
        """None while it runs or was not started; -9 after a SIGKILL."""
        return self.process.poll() if self.process else None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def note(self, beats: Iterable[Heartbeat]) -> None:
        """Find its own sign of life among all, and see whether it moves."""
        for beat in beats:
            mine = self.process and beat.pid == self.process.pid and beat.instance.startswith(self.name)
            if mine and beat.progress > self.progress:
                self.progress, self.moved_s = beat.progress, time.monotonic()

    def bury(self, steps: int) -> None:
        """It died: count that, and make a start due after a pause."""
        now_s = time.monotonic()
        self.deaths.note(steps, self.progress > OPENING_MOVES, now_s)
        self.start_after_s = now_s + self.deaths.pause_s
        self.process = None

    def send(self, number: int) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def last_words(self) -> str:
        """The end of its log, for the sentence that says why it died: one line."""
        lines = self._log()
        return lines[-1] if lines else "it left no log"

    def refusal(self) -> str:
        """The reason it gave for not going on; that may have several lines."""
        begin, lines = f"{self.service}: ", self._log()
        starts = [number for number, line in enumerate(lines) if line.startswith(begin)]
        return " ".join(lines[starts[-1] :]).removeprefix(begin) if starts else self.last_words()

    def _log(self) -> list[str]:
        return self.log_path.read_text(errors="replace").strip().splitlines() if self.log_path.is_file() else []
