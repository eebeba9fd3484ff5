"""A run whose services somebody else starts (containers, other hosts): its folder is made here, it is watched, and its end told.

Whoever starts services also starts them again. So the end is a file, `state/over`: a service that finds it leaves with
code 0, whatever has become of the broker.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from streamopd.errors import StreamError, StreamopdError
from streamopd.learn.checkpoint import load_newest, newest_lineage
from streamopd.schemas import Event, Heartbeat
from streamopd.stream import Broker, Counters
from streamopd.stream.server import shut_down
from streamopd.topology import SERVICES
from streamopd.watch.journal import read
from streamopd.watch.summary import Summary
from streamopd.worker import Run
from streamopd.worker.run import write_whole

from .child import OPENING_MOVES, Deaths
from .lookout import Lookout
from .outcome import completed_before, shortfall, write_outcome

TICK_S = 0.5
FRESH_S = 15.0      # heartbeats come every second
ABSENT_S = 600.0    # without a sign of life from a service that the run needs
PATIENCE_S = 600.0  # with a broker that does not answer: whoever starts services also starts that
STALL_S = 600.0     # an evaluator that makes no progress for so long hangs
QUIET_S = 10.0      # without a heartbeat: everybody has left
LEAVE_S = 60.0      # for that
COMPLETED = "completed"


class Attendant:
    """Watches one run; `stop_broker` ends the broker with it."""

    def __init__(self, run: Run, stop_broker: bool) -> None:
        self.run_ = run
        self.stop_broker = stop_broker
        self.lookout = Lookout(run)
        self.needed = [name for name in SERVICES if name != "evaluator"]
        self.failure = ""
        self.leaving = False                       # asked to: the run goes on without this process
        self._lineage = newest_lineage(run.state_dir)
        self._deaths: defaultdict[str, Deaths] = defaultdict(Deaths)  # by replica: "generator-<host name>"
        self._words: dict[str, str] = {}           # replica -> why it died last
        self._here: dict[str, str] = {}            # replica -> its process that joined and has not left
        self._opened = False                       # seen open by this process
        self._seen_s = dict.fromkeys(SERVICES, time.monotonic())   # the last sign of life
        self._moved = (0, time.monotonic())        # the evaluator's progress, and when that moved
        self._alive_file = Path(os.environ["STREAMOPD_ALIVE_FILE"]) if "STREAMOPD_ALIVE_FILE" in os.environ else None
        self.lookout.heard = self._hear

    def run(self) -> int:
        """0: completed, now or before. 130: asked to leave. StreamopdError: failed, and why."""
        failed = self._over().partition("failed: ")[2]
        if failed:  # started again after the end: only a new beginning removes the file
            self._stop_broker()
            raise StreamopdError(f"The run has failed: {failed}")
        try:
            return asyncio.run(self._attend())
        finally:
            self.lookout.display.stop()

    async def _attend(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._leave)
        before = completed_before(self.run_.folder, self.run_.config.learn.max_steps)
        if before:
            self._tell_over(COMPLETED)
            with suppress(StreamError):  # it may have ended already: this process was killed between that and its own end
                await self._until_gone(await self._reach(FRESH_S))
            return self._end(*before)
        self.run_.over_file.unlink(missing_ok=True)  # before a sign of life: services start at the first one
        (self.run_.folder / "summary.json").unlink(missing_ok=True)
        broker = await self._reach(PATIENCE_S)
        try:
            await self.lookout.skip_old_events(broker)
            await self._until_over(broker)
            await self._until_examined(broker)
        except (StreamopdError, OSError) as error:
            self.failure = self.failure or str(error)
        return 130 if self.leaving else await self._conclude(broker)

    # ---------------------------------------------------------------- the run
    async def _reach(self, patience_s: float) -> Broker:
        """The broker, which may be starting."""
        deadline_s = time.monotonic() + patience_s
        while True:
            self._show_life()
            try:
                return await self.run_.connect()
            except StreamError:
                if time.monotonic() > deadline_s or self.leaving:
                    raise
            await asyncio.sleep(TICK_S)

    async def _until_over(self, broker: Broker) -> None:
        """Look until the learner has ended the run, or it cannot go on."""
        while not (self.failure or self.leaving):
            counters, _ = await self._look(broker)
            self._opened = self._opened or (counters.stamped and counters.end != "closed")
            if counters.end == "closed" and self._learner_is_done():
                return
            self.failure = self._refusal() or self._absence(self.needed, ABSENT_S)
            await asyncio.sleep(TICK_S)

    async def _until_examined(self, broker: Broker) -> None:
        """Look until the evaluator has seen the end."""
        if not self.run_.config.evaluate.enabled:
            return
        newest = load_newest(self.run_.state_dir)
        assert newest is not None or self.failure or self.leaving, "a run that is over has a checkpoint"
        self._moved = (0, time.monotonic())
        while not (self.failure or self.leaving or self._examined(newest.checkpoint.n if newest else 0)):
            _, beats = await self._look(broker)
            self.failure = self._refusal() or self._absence(["evaluator"], ABSENT_S) or self._stall(beats)
            await asyncio.sleep(TICK_S)

    async def _until_gone(self, broker: Broker) -> None:
        """Nobody shows a sign of life any more, or waiting has no point."""
        began_s = time.monotonic()
        while time.monotonic() < began_s + LEAVE_S and not self.leaving:
            with suppress(StreamError):
                here = _fresh(await broker.beats(), QUIET_S)
                if not here and time.monotonic() > began_s + QUIET_S:
                    return
            self._show_life()
            await asyncio.sleep(TICK_S)

    async def _look(self, broker: Broker) -> tuple[Counters, Sequence[Heartbeat]]:
        """What the broker says; one that does not answer is waited for."""
        deadline_s, told = time.monotonic() + PATIENCE_S, False
        while True:
            self._show_life()
            try:
                counters, beats = await self.lookout.look(broker)
                self._note(_fresh(beats, FRESH_S))
                return counters, beats
            except StreamError as error:
                if self.leaving or time.monotonic() > deadline_s:
                    raise
                if not told:
                    told = True
                    self.lookout.say("broker", "supervisor", f"waiting up to {PATIENCE_S:.0f} s for the broker: {error}")
            await asyncio.sleep(TICK_S)
            self._seen_s = dict.fromkeys(SERVICES, time.monotonic())  # without a broker nobody can be seen

    def _note(self, here: Sequence[Heartbeat]) -> None:
        for beat in here:
            self._seen_s[beat.service] = time.monotonic()

    def _hear(self, event: Event) -> None:
        """Deaths: those that services tell of, and of whoever joins again and never left. A replica that only dies ends the run."""
        service, replica = event.source.partition("-")[0], event.source.rsplit("-", 2)[0]
        if service not in SERVICES:
            return
        if event.kind == "join":
            if replica in self._here:
                self._count_death(replica, self._here[replica], "none: it was killed, or had too little memory")
            self._here[replica] = event.source
        elif event.kind == "leave":
            self._here.pop(replica, None)
        elif event.kind == "failure":
            self._count_death(replica, event.source, event.text)

    def _count_death(self, replica: str, source: str, words: str) -> None:
        worked = any(beat.progress > OPENING_MOVES for beat in self.lookout.account.lives.values() if beat.instance == source)
        self._deaths[replica].note(self.lookout.steps, worked, now_s=time.monotonic())
        self._words[replica] = words

    def _refusal(self) -> str:
        """Why a service gave up, in its own words; "" while none did."""
        for source, text in self.lookout.refused.items():
            return f"{source} gave up. {text}"
        for replica, deaths in self._deaths.items():
            if deaths.too_many:
                service = replica.partition("-")[0]
                return f"The {service} died {deaths.too_many}. Its last words: {self._words[replica]}"
        return ""

    def _absence(self, services: Sequence[str], limit_s: float) -> str:
        for service in services:
            quiet_s = time.monotonic() - self._seen_s[service]
            if quiet_s > limit_s:
                return (
                    f"No {service} has shown a sign of life for {quiet_s:.0f} s, and the run needs one. "
                    f"Start it: streamopd {service} {self.run_.folder}"
                )
        return ""

    def _stall(self, beats: Sequence[Heartbeat]) -> str:
        progress = max((beat.progress for beat in beats if beat.service == "evaluator"), default=0)
        if progress != self._moved[0]:
            self._moved = (progress, time.monotonic())
        quiet_s = time.monotonic() - self._moved[1]
        return f"The evaluator made no progress for {quiet_s:.0f} s. Its log says more." if quiet_s > STALL_S else ""

    def _learner_is_done(self) -> bool:
        """Its final checkpoint is of a run seen open, or of a later learner, or has all its steps: a closed door alone may be old."""
        newest, enough = load_newest(self.run_.state_dir), self.run_.config.learn.max_steps
        if newest is None or not newest.checkpoint.done:
            return False
        return self._opened or newest.checkpoint.lineage > self._lineage or 0 < enough <= newest.checkpoint.n

    def _examined(self, n: int) -> bool:
        return any((line["who"], line["n"]) == ("student", n) for line in read(self.run_.folder / "evaluations.jsonl"))

    # ---------------------------------------------------------------- people
    def _leave(self) -> None:
        self.leaving = True

    def _show_life(self) -> None:
        if self._alive_file:
            self._alive_file.touch()

    # ---------------------------------------------------------------- the end
    def _over(self) -> str:
        return self.run_.over_file.read_text() if self.run_.over_file.exists() else ""

    def _tell_over(self, how: str) -> None:
        try:
            write_whole(self.run_.over_file, how.encode(), mode=0o644)
        except OSError:  # a full disk has room for a name
            self.run_.over_file.touch()

    async def _conclude(self, broker: Broker) -> int:
        """Write down how it ended, for people and for whoever starts again."""
        status = self._status()
        self._tell_over(f"failed: {self.failure}" if self.failure else status)
        await self._until_gone(broker)
        lives = list(self.lookout.account.lives.values())
        return self._end(*write_outcome(self.run_.folder, status, self.lookout.started_s, lives))

    def _end(self, summary: Summary, report: Path) -> int:
        """Tell it, and end the broker if that is ours."""
        self.lookout.display.finish(summary, report, self.failure)
        self._stop_broker()
        if self.failure:
            raise StreamopdError(self.failure)
        return 0 if summary.status == COMPLETED else 130

    def _stop_broker(self) -> None:
        if self.stop_broker:
            shut_down(*self.run_.address())

    def _status(self) -> str:
        """Also finds out what a run lacks that claims to be complete."""
        stopped = self.run_.stop_file.exists()
        if not self.failure and not stopped:
            self.failure = shortfall(self.run_.folder, self.run_.config.learn.max_steps)
        return "failed" if self.failure else "stopped" if stopped else COMPLETED


def _fresh(beats: Sequence[Heartbeat], within_s: float) -> list[Heartbeat]:
    return [beat for beat in beats if beat.state != "left" and time.time() - beat.born_s < within_s]
