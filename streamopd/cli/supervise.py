"""All services of a run as local processes: started, watched, restarted, and gone when the run is."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from typing import IO

import msgspec

from streamopd.errors import StreamopdError
from streamopd.schemas import Event
from streamopd.stream import Broker
from streamopd.stream.server import Server, start_server
from streamopd.watch.display import Display
from streamopd.watch.journal import Journal
from streamopd.worker import Run
from streamopd.worker.patient import patient
from streamopd.worker.process import EXIT_USER, die_with_parent
from streamopd.worker.run import BrokerAddress, write_private

from .outcome import Account, last_metrics, write_outcome

TICK_S = 0.5
MAX_RESTARTS = 5           # without a step in between
GRACE_S = 30.0


class Child:
    """One service process and its history."""

    def __init__(self, run: Run, service: str, index: int) -> None:
        self.run, self.service, self.name = run, service, f"{service}-{index}"
        self.restarts = 0
        self.next_start_s = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self.log_path = run.folder / "logs" / f"{self.name}.log"

    def start(self) -> None:
        log: IO[bytes]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "streamopd", self.service, str(self.run.folder), "--instance", self.name],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent,
            )

    def code(self) -> int | None:
        """None while it runs; -9 after a SIGKILL."""
        return self.process.poll() if self.process else None

    def send(self, number: int) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def last_words(self) -> str:
        """The end of its log, for the sentence that says why it died."""
        lines = self.log_path.read_text(errors="replace").strip().splitlines() if self.log_path.is_file() else []
        return lines[-1] if lines else "it left no log"


class Supervisor:
    """Starts the broker and the services; ends with the run."""

    def __init__(self, run: Run) -> None:
        self.run_ = run
        self.account = Account()
        self.display = Display(run.config.name, run.config.learn.max_steps)
        self.events = Journal(run.folder / "events.jsonl")
        self.children = [Child(run, service, i) for service, count in self._wanted().items() for i in range(count)]
        self.server: Server | None = None
        self.stopping = False
        self.failure = ""
        self.started_s = time.time()
        self._event_id = "0"
        self._steps = 0

    def _wanted(self) -> dict[str, int]:
        config = self.run_.config
        services = {"learner": 1, "generator": config.generator.replicas, "teacher": config.teacher.replicas, "feeder": 1, "packer": 1}
        return services | ({"evaluator": 1} if config.evaluate.enabled else {})

    def run(self) -> int:
        """0: completed. 1: failed. 2: refused. 130: stopped by Ctrl-C."""
        try:
            self._start_broker()
            return asyncio.run(self._watch())
        finally:
            self._kill_all()
            if self.server:
                self.server.stop()

    def _start_broker(self) -> None:
        """The embedded server, new or again on its folder: everything acknowledged is there."""
        if self.run_.config.redis.url:
            return
        self.server = start_server(self.run_.state_dir / "broker")
        address = BrokerAddress(url=self.server.url, password=self.server.password)
        write_private(self.run_.state_dir / "broker.json", msgspec.json.encode(address))

    async def _watch(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._ask_to_stop)
        broker = patient(await self.run_.connect(), patience_s=20.0)
        await self._skip_old_events(broker)
        try:
            await self._until_over(broker)
            await self._until_gone(broker)
        finally:
            await self._gather(broker)
            await broker.close_connection()
        return self._conclude()

    async def _until_over(self, broker: Broker) -> None:
        """Tick while the run is on: restart who died, show what goes on."""
        first = (await broker.counters()).steps
        while not self.failure:
            await self._tend_broker()
            counters = await self._gather(broker)
            if counters.end == "closed" and self._learner_left():
                return
            for child in self.children:
                self._tend(child, over=counters.end == "closed", learning=counters.steps > first)
            await asyncio.sleep(TICK_S)

    async def _until_gone(self, broker: Broker) -> None:
        """The others see the end and leave; who does not is told, then killed."""
        deadline_s = time.monotonic() + (GRACE_S if not self.failure else 5.0) + (300.0 if self._evaluating() else 0.0)
        told = bool(self.failure)
        if told:
            self._tell_all(signal.SIGTERM)
        while any(child.code() is None for child in self.children if child.process) and time.monotonic() < deadline_s:
            if self.stopping and not told:
                told = True
                self._tell_all(signal.SIGTERM)
            await self._gather(broker)
            await asyncio.sleep(TICK_S / 2)

    async def _gather(self, broker: Broker):  # type: ignore[no-untyped-def]
        """The broker's view and everybody's signs of life, into the account and onto the screen."""
        counters, beats = await broker.counters(), await broker.beats()
        self.account.note(beats)
        await self._write_events(broker)
        self._steps = max(self._steps, counters.steps)
        self.display.update(counters, beats, last_metrics(self.run_.folder), time.time() - self.started_s)
        return counters

    async def _write_events(self, broker: Broker) -> None:
        for event_id, event in await broker.events(self._event_id):
            self._event_id = event_id
            self.events.write(event)
            self.display.event(event)

    async def _skip_old_events(self, broker: Broker) -> None:
        for event_id, _ in await broker.events(self._event_id):
            self._event_id = event_id

    async def _tend_broker(self) -> None:
        """A broker that died is started on its folder; the services wait for it meanwhile."""
        if self.server and not self.server.running():
            await asyncio.to_thread(self._start_broker)
            self._say("restart", "broker", "the broker ended and was started again on its folder")

    def _tend(self, child: Child, over: bool, learning: bool) -> None:
        """Start, and restart with back-off; a crash loop or a refusal ends the run with its reason."""
        code = child.code()
        if child.service == "evaluator" and child.process is None and not (learning or over):
            return  # fewer torch imports at once: the first step is sooner
        if child.process is not None and code is None:
            return
        if child.process is not None and code is not None:
            if code == 0 and (over or self.stopping or child.service == "evaluator"):
                return
            if code == EXIT_USER:
                self.failure = f"{child.name} gave up. {child.last_words()}"
                return
            self._note_death(child, code)
            child.process = None
        if not self.failure and time.monotonic() >= child.next_start_s:
            child.start()

    def _note_death(self, child: Child, code: int) -> None:
        child.restarts = child.restarts + 1 if self._steps == getattr(child, "steps_at_death", -1) else 1
        child.steps_at_death = self._steps  # type: ignore[attr-defined]
        child.next_start_s = time.monotonic() + min(8.0, 0.5 * 2 ** (child.restarts - 1))
        self._say("restart", child.name, f"{child.name} ended with code {code}; start {child.restarts + 1} follows")
        if child.restarts > MAX_RESTARTS:
            self.failure = (
                f"{child.name} died {child.restarts} times without a step in between. Its last words: {child.last_words()} "
                f"The whole log: {child.log_path}"
            )

    def _say(self, kind: str, source: str, text: str) -> None:
        event = Event(kind=kind, source=source, born_s=time.time(), text=text)
        self.events.write(event)
        self.display.event(event)

    def _ask_to_stop(self) -> None:
        """Ctrl-C: the step in hand is finished and kept; a second one does not wait."""
        if self.stopping:
            self.failure = "stopped at once: Ctrl-C came twice. The same command resumes from the last checkpoint."
            return
        self.stopping = True
        self.run_.stop_file.touch()
        self._say("stop", "supervisor", "stopping after the step in hand; Ctrl-C again stops at once")

    def _learner_left(self) -> bool:
        return all(child.code() == 0 for child in self.children if child.service == "learner")

    def _evaluating(self) -> bool:
        return not self.stopping and not self.failure and self.run_.config.evaluate.enabled

    def _tell_all(self, number: int) -> None:
        for child in self.children:
            child.send(number)

    def _kill_all(self) -> None:
        self._tell_all(signal.SIGKILL)
        self._tell_all(signal.SIGCONT)
        for child in self.children:
            if child.process:
                child.process.wait()

    def _conclude(self) -> int:
        status = "failed" if self.failure else "stopped" if self.stopping else "completed"
        summary, report = write_outcome(self.run_.folder, status, self.started_s, list(self.account.lives.values()))
        self.display.finish(summary, report, self.failure)
        if self.failure:
            raise StreamopdError(self.failure)
        return 130 if self.stopping else 0


