"""`--in-process`: the same services on one event loop, the stream in memory. One order of events, nothing to kill."""

from __future__ import annotations

import asyncio
import importlib
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamopd.errors import StreamopdError
from streamopd.stream.memory import MemoryBroker, MemoryStore
from streamopd.worker import Run, Worker
from streamopd.worker.process import guarded

from .lookout import Lookout
from .outcome import completed_before, shortfall, write_outcome

ORDER = ("learner", "feeder", "generator", "teacher", "packer")
LOOK_S = 0.5


def run_in_process(run: Run) -> int:
    """0: completed, now or before. 130: stopped by Ctrl-C. StreamopdError: failed, and why."""
    together = Together(run)
    before = completed_before(run.folder, run.config.learn.max_steps)
    if before:
        together.lookout.display.finish(*before)
        return 0
    (run.folder / "summary.json").unlink(missing_ok=True)
    with traces_in(together.log_path):
        return asyncio.run(together.run_all())


class Together:
    """The services of a run on one event loop; a failure of one is a failure of the run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.log_path = run.folder / "logs" / "in-process.log"
        self.lookout = Lookout(run)
        self.store = MemoryStore()
        self.workers: dict[str, Worker] = {}
        self.stopping = False

    async def run_all(self) -> int:
        """Serve to the end, to a failure, or until people ask to stop; then the account."""
        serving = asyncio.create_task(self._serve_all())
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._ask_to_stop, serving)
        try:
            await asyncio.wait([serving])
            failure = None if serving.cancelled() else failure_in(serving.exception())
            await self.lookout.look(self._broker())
            return self._conclude(failure)
        finally:
            self.lookout.display.stop()

    async def _serve_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch())
            async with asyncio.TaskGroup() as services:
                for service in self._names():
                    services.create_task(self._serve(service))
            watching.cancel()

    def _names(self) -> tuple[str, ...]:
        return (*ORDER, "evaluator") if self.run.config.evaluate.enabled else ORDER

    async def _serve(self, service: str) -> None:
        """One service to its end."""
        module = importlib.import_module(f"streamopd.services.{service}")
        async with Worker(self.run, service, f"{service}-0", self._broker(), inline=True) as worker:
            self.workers[service] = worker
            if await guarded(module.main, self.run, worker):
                raise StreamopdError(f"{service} failed. {self._last_failure()} The trace is in {self.log_path}")

    def _broker(self) -> MemoryBroker:
        return MemoryBroker(self.run.limits, self.store)

    def _last_failure(self) -> str:
        return next((event.text for _, event in reversed(self.store.events) if event.kind == "failure"), "")

    async def _watch(self) -> None:
        """Events to events.jsonl, signs of life to the screen."""
        broker = self._broker()
        while True:
            await self.lookout.look(broker)
            await asyncio.sleep(LOOK_S)

    def _ask_to_stop(self, serving: asyncio.Task[None]) -> None:
        """Ctrl-C: the step in hand is finished and kept, nobody is examined any more; a second one does not wait."""
        if self.stopping:
            serving.cancel()
            return
        self.stopping = True
        self.run.stop_file.touch()
        if "evaluator" in self.workers:
            self.workers["evaluator"].draining.set()
        self.lookout.say("stop", "supervisor", "stopping after the step in hand; Ctrl-C again stops at once")

    def _conclude(self, failure: StreamopdError | None) -> int:
        """Write down what the run came to. A failure is raised whatever becomes of its summary."""
        stopped = self.stopping or self.run.stop_file.exists()
        missing = "" if failure or stopped else shortfall(self.run.folder, self.run.config.learn.max_steps)
        failure = StreamopdError(missing) if missing else failure
        status = "failed" if failure else "stopped" if stopped else "completed"
        try:
            lives = list(self.lookout.account.lives.values())
            summary, report = write_outcome(self.run.folder, status, self.lookout.started_s, lives)
            self.lookout.display.finish(summary, report, str(failure or ""))
        finally:
            if failure:
                raise failure
        return 130 if stopped else 0


def failure_in(error: BaseException | None) -> StreamopdError | None:
    """What went wrong first, as one of ours: the others were cancelled for it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is None or isinstance(error, StreamopdError):
        return error
    failure = StreamopdError(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


@contextmanager
def traces_in(file: Path) -> Iterator[None]:
    """What the services log goes to `file`, as each one's would to its own, and not between what people read."""
    log, handler = logging.getLogger("streamopd"), logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    before, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before
        handler.close()
