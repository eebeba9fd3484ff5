"""All services of a run as local processes: started, watched, restarted, and gone when the run is."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import suppress

from streamopd.errors import StreamError, StreamopdError
from streamopd.learn.checkpoint import load_newest, newest_lineage
from streamopd.stream import Broker, Counters
from streamopd.worker import Run
from streamopd.worker.process import EXIT_USER

from .child import Child, Command, service_command
from .embedded import EmbeddedBroker
from .lookout import Lookout
from .outcome import completed_before, shortfall, write_outcome

TICK_S = 0.5
PATIENCE_S = 120.0         # with a broker that does not answer: as long as the services have
GRACE_S = 30.0             # for the services to see the end and leave
FAILED_S = 5.0             # the same once the run has failed
EXAM_S = 2.0               # for the evaluator's last look once people want to stop
STALL_S = 600.0            # an evaluator that makes no progress for so long hangs


class Supervisor:
    """Starts the broker and the services; ends with the run."""

    def __init__(self, run: Run, command: Command = service_command) -> None:
        self.run_ = run
        self.broker = EmbeddedBroker(run)
        self.lookout = Lookout(run)
        names = [(service, f"{service}-{i}") for service, count in self._wanted().items() for i in range(count)]
        self.children = [
            Child(service, name, command(run.folder, service, name), run.folder / "logs" / f"{name}.log") for service, name in names
        ]
        self.evaluator = next((child for child in self.children if child.service == "evaluator"), None)
        self.stopping = False      # people asked: the step in hand is finished first
        self.at_once = False       # they asked twice
        self.failure = ""
        self._lineage = newest_lineage(run.state_dir)  # of lives before: what is higher is of this one
        self._exam_until_s = 0.0   # once people want to stop

    def _wanted(self) -> dict[str, int]:
        config = self.run_.config
        services = {"learner": 1, "generator": config.generator.replicas, "teacher": config.teacher.replicas, "feeder": 1, "packer": 1}
        return services | ({"evaluator": 1} if config.evaluate.enabled else {})

    def run(self) -> int:
        """0: completed, now or before. 130: stopped by Ctrl-C. StreamopdError: failed, and why."""
        before = completed_before(self.run_.folder, self.run_.config.learn.max_steps)
        if before:
            self.lookout.display.finish(*before)
            return 0
        (self.run_.folder / "summary.json").unlink(missing_ok=True)
        try:
            self.broker.start()
            return asyncio.run(self._watch())
        finally:
            self._kill_all()
            self.lookout.display.stop()
            self.broker.stop()

    async def _watch(self) -> int:
        self._listen()
        broker = await self.run_.connect()
        try:
            await self.lookout.skip_old_events(broker)
            await self._until_over(broker)
            await self._until_gone(broker)
        except (StreamopdError, OSError) as error:
            self.failure = self.failure or ("" if self.at_once else str(error))
        finally:
            self._kill_all()
            with suppress(StreamopdError, OSError):  # what went wrong before is the cause
                await self.lookout.look(broker)
            await broker.close_connection()
        return self._conclude()

    # ---------------------------------------------------------------- the run
    async def _until_over(self, broker: Broker) -> None:
        """Tick while the run is on: start what is needed, restart who died, show what goes on."""
        first = (await self._look(broker)).steps
        while not self.failure and not self.at_once:
            codes = [child.code() for child in self.children]  # before the look: it sees the end that made them leave
            counters = await self._look(broker)
            if self._learner_is_done():
                return
            for child, code in zip(self.children, codes, strict=True):
                self._tend(child, code, closed=counters.end == "closed", learning=counters.steps > first)
            await asyncio.sleep(TICK_S)

    async def _until_gone(self, broker: Broker) -> None:
        """The evaluator has its last look and the others leave; who does not is killed."""
        deadline_s = time.monotonic() + (FAILED_S if self.failure else GRACE_S)
        if self.failure:
            self._tell_all(signal.SIGTERM)
        if self.evaluator:
            self.evaluator.moved_s = time.monotonic()  # until now it waited for the end, which is no stall
        while not self.at_once:
            exam_goes_on = self._tend_exam()
            others = [child for child in self.children if child.alive and (self.failure or child is not self.evaluator)]
            if not exam_goes_on and (not others or time.monotonic() > deadline_s):
                return
            await self._look(broker)
            await asyncio.sleep(TICK_S / 2)

    def _tend(self, child: Child, code: int | None, closed: bool, learning: bool) -> None:
        """Start, and restart with back-off; a crash loop or a refusal ends the run with its reason."""
        if code is not None:
            if self._left_for_good(child, code, closed):
                return
            self.failure = self.failure or self._refusal()
            if self.failure:
                return
            self._bury(child, code)
        due = child.process is None and time.monotonic() >= child.start_after_s
        if due and not self.failure and self._needed(child, closed, learning):
            child.start()

    def _needed(self, child: Child, closed: bool, learning: bool) -> bool:
        """A closed run is the learner's alone: it opens it again, or finishes it."""
        if child.service == "learner":
            return True
        if closed or self.stopping:
            return False
        return learning or child is not self.evaluator  # fewer torch imports at once: the first step is sooner

    def _left_for_good(self, child: Child, code: int, closed: bool) -> bool:
        """Who is not needed any more; the learner always is, and the evaluator until it has seen the end."""
        if child.service == "learner":
            return False
        return self.stopping or (closed and (code == 0 or child is not self.evaluator))

    def _refusal(self) -> str:
        """Why a service gave up, in its own words; "" while none did. On a full disk its log and its exit code may not say."""
        for child in self.children:
            pid = child.process.pid if child.process else 0
            told = self.lookout.refused.get(f"{child.name}-{pid}", "")
            if told or child.code() == EXIT_USER:
                return f"{child.name} gave up. {told or child.refusal()}"
        return ""

    def _bury(self, child: Child, code: int) -> None:
        child.bury(self.lookout.steps)
        self.lookout.say("restart", child.name, f"{child.name} ended with code {code}; start {child.deaths.counted + 1} follows")
        if child.deaths.too_many:
            self.failure = (
                f"{child.name} died {child.deaths.too_many}. Its last words: {child.last_words()} The whole log: {child.log_path}"
            )

    def _learner_is_done(self) -> bool:
        """It left, and its last checkpoint is a final one of this life: a 0 alone may have been a closed door."""
        left = all(child.code() == 0 for child in self.children if child.service == "learner")
        if not left or newest_lineage(self.run_.state_dir) == self._lineage:
            return False
        newest = load_newest(self.run_.state_dir)
        return newest is not None and newest.checkpoint.done and newest.checkpoint.lineage > self._lineage

    def _tend_exam(self) -> bool:
        """Whether the evaluator is waited for: started again when it dies, killed when it hangs, hurried when people leave."""
        child = self.evaluator
        if child is None or self.failure:
            return False
        if self.stopping:
            if not self._exam_until_s:
                self._exam_until_s = time.monotonic() + EXAM_S
                child.send(signal.SIGTERM)
            return child.alive and time.monotonic() < self._exam_until_s
        code = child.code()
        if code == 0:
            return False
        if child.alive and time.monotonic() - child.moved_s > STALL_S:
            self.lookout.say("stall", child.name, f"{child.name} made no progress for {STALL_S:.0f} s and is killed")
            child.send(signal.SIGKILL)
        self._tend(child, code, closed=False, learning=True)
        return not self.failure

    async def _look(self, broker: Broker) -> Counters:
        """What the broker says; one that does not answer is waited for, or started again where it is ours."""
        deadline_s, told = time.monotonic() + PATIENCE_S, False
        while True:
            try:
                if self.broker.tend(self.lookout.steps):
                    self.lookout.say("restart", "broker", "the broker ended and was started again on its folder")
                counters, beats = await self.lookout.look(broker)
            except StreamError as error:
                self.failure = self.failure or self._refusal()  # of a service that saw more of the cause
                if self.failure or self.at_once or time.monotonic() > deadline_s:
                    raise StreamopdError(
                        f"The broker was lost: {error} It was waited for {PATIENCE_S:.0f} s. "
                        "Start it, then give the same command again: the run goes on from its last checkpoint."
                    ) from error
                if not told:
                    told = True
                    self.lookout.say("broker", "supervisor", f"waiting up to {PATIENCE_S:.0f} s for the broker: {error}")
                await asyncio.sleep(TICK_S)
                continue
            for child in self.children:
                child.note(beats)
            return counters

    # ---------------------------------------------------------------- people
    def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._ask_to_stop)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup, which means: go on
            loop.add_signal_handler(signal.SIGHUP, self._hang_up)

    def _ask_to_stop(self) -> None:
        """Ctrl-C: the step in hand is finished and kept; a second one does not wait."""
        if self.stopping:
            self.at_once = True
            return
        self.stopping = True
        self.run_.stop_file.touch()
        self.lookout.say("stop", "supervisor", "stopping after the step in hand; Ctrl-C again stops at once")

    def _hang_up(self) -> None:
        """The terminal went away: stop as for SIGTERM. One closed window may say so twice."""
        self.lookout.go_silent()
        if not self.stopping:
            self._ask_to_stop()

    # ---------------------------------------------------------------- the end
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
        """Write down what the run came to. A failure is raised whatever becomes of its summary."""
        stopped = self.stopping or self.run_.stop_file.exists()
        if not self.failure and not stopped:
            self.failure = shortfall(self.run_.folder, self.run_.config.learn.max_steps)
        status = "failed" if self.failure else "stopped" if stopped else "completed"
        assert status != "completed" or self.evaluator is None or self.evaluator.code() == 0
        try:
            lives = list(self.lookout.account.lives.values())
            summary, report = write_outcome(self.run_.folder, status, self.lookout.started_s, lives)
            self.lookout.display.finish(summary, report, self.failure)
        finally:
            if self.failure:
                raise StreamopdError(self.failure)
        return 130 if stopped else 0
