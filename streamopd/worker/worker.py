"""The run loop's tools: take items, hand them on, show signs of life, and leave when the run ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from streamopd.errors import GarbageRecord
from streamopd.schemas import Event, Group, Heartbeat, Prompt, Scored, Weights, decode, encode
from streamopd.stream import Broker, Entry, HandOff
from streamopd.tasks import cancel_until_done
from streamopd.topology import Stage
from streamopd.watch.metrics import ServiceFigures
from streamopd.worker.run import Run

T = TypeVar("T")
Record = Prompt | Group | Scored
KINDS: dict[Stage, type[Record]] = {Stage.ISSUED: Prompt, Stage.GENERATED: Group, Stage.SCORED: Scored}
BEAT_S = 1.0
STAMP_S = 0.1   # between two looks at a broker that awaits the learner's stamp
GOODBYE_S = 5.0
LOOK_S = 0.05  # looks at the broker are no closer together than this


class Ended(Exception):
    """The run is over, or this process was asked to leave: unwind, nothing is wrong."""


class Lease(msgspec.Struct, Generic[T], eq=False):
    """An item in hand: its entry in the broker and its record."""

    entry: Entry
    record: T
    taken_s: float


class Worker:
    """One service instance at work. `inline` runs the computing on the event loop: one process, one order of events."""

    def __init__(self, run: Run, service: str, instance: str, broker: Broker, inline: bool = False) -> None:
        self.run = run
        self.service = service
        self.instance = instance
        self.broker = broker
        self.inline = inline
        self.state = "starting"
        self.waits_for = ""
        self.version = -1
        self.behind = ""  # why the newest weights are not served, while that lasts
        self.counters: dict[str, float] = {}
        self.figures = ServiceFigures()      # the newest heartbeat, for whoever measures
        self.weights: Weights | None = None  # the newest manifest seen
        self.boot = ""
        self.steps = 0                       # done, as the broker says
        self.closed = False
        self.draining = asyncio.Event()
        self._alive_file = Path(os.environ["STREAMOPD_ALIVE_FILE"]) if "STREAMOPD_ALIVE_FILE" in os.environ else None
        self.attended = self._alive_file is not None  # by an engine that starts containers, and an Attendant
        self._progress = 0
        self._held: dict[str, Lease[Any]] = {}
        self._renewed_progress = -1
        self._reaped_s = 0.0
        self._faults = 0
        self._fault: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # ---------------------------------------------------------------- life
    async def __aenter__(self) -> Worker:
        await self.look()
        await self.emit("join", f"{self.instance} joined, pid {os.getpid()}")
        for job in (self._beat_on, self._watch, self._renew_on):
            self.in_background(job())
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_until_done(*self._tasks)
        goodbye = asyncio.create_task(self._say_goodbye())
        await asyncio.wait([goodbye], timeout=GOODBYE_S)  # the broker may be gone already
        await cancel_until_done(goodbye)

    async def _say_goodbye(self) -> None:
        await self.broker.release([lease.entry for lease in self._held.values()])
        self.state = "left"
        await self._beat()
        await self.emit("leave", f"{self.instance} left", wait_s=self.counters.get("wait_s", 0.0), cpu_s=time.process_time())

    def in_background(self, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A job beside the service; what it raises stops the service at its next look."""
        task = asyncio.create_task(job)
        task.add_done_callback(self._note_fault)
        self._tasks.append(task)
        return task

    def _note_fault(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._fault = task.exception()

    def moved(self, by: int = 1) -> None:
        """Progress: what leases and liveness are judged by."""
        self._progress += by
        self.counters["moved_s"] = time.time()

    async def compute(self, work: Callable[..., T], *args: Any, **named: Any) -> T:
        """`work(*args)` off the event loop, so that leases are renewed meanwhile."""
        if self.inline:
            result = work(*args, **named)
            await asyncio.sleep(0)
        else:
            result = await asyncio.to_thread(work, *args, **named)
        self.moved()
        return result

    async def emit(self, kind: str, text: str, **data: float | str) -> None:
        """Tell people."""
        await self.broker.emit(Event(kind=kind, source=self.instance, born_s=time.time(), text=text, data=data))

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what is waited for, and count the seconds."""
        start_s, self.state, self.waits_for = time.monotonic(), "waiting", what
        try:
            yield
        finally:
            self.state, self.waits_for = "working", ""
            self.counters["wait_s"] = self.counters.get("wait_s", 0.0) + time.monotonic() - start_s

    async def news(self, what: str, timeout_s: float = 1.0) -> None:
        """Wait for something to change; raise Ended when the run did."""
        self.leave_if_over()
        with self.waiting(what):
            await self.broker.news(timeout_s)
        await self.look()
        self.leave_if_over()

    def leave_if_over(self) -> None:
        """Raise Ended when the run is over or this process is to leave, and what a background job raised."""
        self.leave_if_asked()
        if self.closed:
            raise Ended

    def leave_if_asked(self) -> None:
        if self._fault is not None:
            raise self._fault
        if self.draining.is_set():
            raise Ended

    async def look(self) -> None:
        """What the broker says now: boot, end, newest weights. Another boot voids everything in hand."""
        counters = await self.broker.counters()
        boot = counters.boot if counters.stamped else ""
        if boot and boot != self.boot:
            self._held = {key: lease for key, lease in self._held.items() if lease.entry.boot == boot}
            self.boot = boot
        self.closed, self.steps = counters.end == "closed", counters.steps
        if counters.weights_n >= 0 and (self.weights is None or (self.weights.boot, self.weights.n) != (boot, counters.weights_n)):
            self.weights = await self.broker.weights()

    # ---------------------------------------------------------------- items
    async def take(self, stage: Stage, count: int, block_s: float = 1.0) -> list[Lease[Any]]:
        """Up to `count` items with good records; what cannot be trusted is quarantined and issued again."""
        self.leave_if_over()
        if any(lease.entry.alone for lease in self._held.values()):
            return []
        entries = await self._recovered(stage, count)
        if not entries and time.monotonic() - self._reaped_s > self.run.config.stream.lease_ttl_s / 4:
            self._reaped_s = time.monotonic()
            entries = await self.broker.reap(
                stage, self.instance, self.run.config.stream.lease_ttl_s, count, empty=not self._held
            )
        if not entries:
            with self.waiting(stage.stream) if block_s and not self._held else contextlib.nullcontext():
                entries = await self.broker.read(stage, self.instance, count, block_s, empty=not self._held)
        return await self.open(entries, KINDS[stage])

    async def open(self, entries: Sequence[Entry], kind: type[T]) -> list[Lease[T]]:
        """Leases over entries; a bad record goes to quarantine, its group back to the feeder."""
        leases = []
        for entry in entries:
            try:
                record = self._decode(entry, kind)
            except GarbageRecord as error:
                await self.refuse(entry, str(error))
                continue
            lease = Lease(entry, record, time.monotonic())
            self._held[entry.id] = lease
            leases.append(lease)
        self.moved(len(leases))
        return leases

    async def refuse(self, entry: Entry, reason: str) -> None:
        """Quarantine an entry's payload with its reason and have its group issued again."""
        self._held.pop(entry.id, None)
        await self.broker.quarantine(self.instance, reason, entry.body[:4096], entry.seq)
        await self.in_this_life(entry, lambda: self.broker.reissue(entry, reason))
        await self.emit("quarantine", f"group {entry.seq} at {entry.stage.stream}: {reason}", seq=entry.seq)

    async def in_this_life(self, entry: Entry, call: Callable[[], Awaitable[str]]) -> str:
        """Make a call, and again while a restarted broker awaits the learner's stamp; another boot voids the entry."""
        while (answer := await call()) == "amnesia" and entry.boot == self.boot:
            await self._await_stamp()
        return answer

    async def _await_stamp(self) -> None:
        self.leave_if_asked()
        await asyncio.sleep(STAMP_S)
        await self.look()

    async def hand(self, pairs: Sequence[tuple[Lease[Any], Any]]) -> None:
        """Each lease's next record, atomically; "already" is fine: somebody else was first."""
        handed = {lease.entry.id: HandOff(lease.entry, encode(record)) for lease, record in pairs if self.holds(lease)}
        while handed and "amnesia" in await self.broker.hand(list(handed.values())):
            await self._await_stamp()  # another boot voids what is held
            handed = {key: item for key, item in handed.items() if key in self._held}
        self.forget(lease for lease, _ in pairs)
        self.moved(len(pairs))

    async def release(self, leases: Sequence[Lease[Any]]) -> None:
        """Back to the stream: I cannot work on these now."""
        await self.broker.release([lease.entry for lease in leases])
        self.forget(leases)

    def forget(self, leases: Any) -> None:
        for lease in list(leases):
            self._held.pop(lease.entry.id, None)

    def holds(self, lease: Lease[Any]) -> bool:
        """Whether the lease is still of this life of the broker."""
        return lease.entry.id in self._held

    @property
    def progress(self) -> int:
        return self._progress

    @property
    def held_ids(self) -> set[str]:
        return set(self._held)

    def _decode(self, entry: Entry, kind: type[T]) -> T:
        if entry.problem:
            raise GarbageRecord(entry.problem)
        try:
            record: Any = decode(kind, entry.body, self.run.limits.max_record_bytes)
        except ValueError as error:
            raise GarbageRecord(str(error)) from None
        for name, theirs, ours in (
            ("run", record.run, self.run.id),
            ("method", record.method, self.run.method.digest),
            ("seq", _seq(record), entry.seq),
        ):
            if theirs != ours:
                raise GarbageRecord(f"its {name} is {theirs!r}, this entry's is {ours!r}")
        return record  # type: ignore[no-any-return]

    async def _recovered(self, stage: Stage, count: int) -> list[Entry]:
        """After an unanswered call, entries may lie under this name that this process does not know of."""
        faults = getattr(self.broker, "faults", 0)
        if faults == self._faults:
            return []
        self._faults = faults
        found = [e for e in await self.broker.own_pending(stage, self.instance) if e.id not in self._held]
        alone = [e for e in found if e.alone]
        kept = alone[:1] if alone and not self._held else [e for e in found if not e.alone][:count]
        await self.broker.release([e for e in found if e not in kept])
        return kept

    # ---------------------------------------------------------------- background
    async def _beat_on(self) -> None:
        while True:
            await self._beat()
            if self._alive_file:
                self._alive_file.touch()
            if self.run.over_file.exists():
                self.draining.set()
            await asyncio.sleep(BEAT_S)

    async def _beat(self) -> None:
        self.counters["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.counters["cpu_s"] = time.process_time()
        self.figures.beat = Heartbeat(
            service=self.service, instance=self.instance, pid=os.getpid(), born_s=time.time(), progress=self._progress,
            state="behind" if self.behind else self.state, waits_for=self.behind or self.waits_for,
            version=self.version, counters=dict(self.counters),
        )
        await self.broker.beat(self.figures.beat)

    async def _watch(self) -> None:
        """Keep `weights`, `boot` and `closed` fresh while the service computes."""
        while True:
            await self.broker.news(1.0)
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def _renew_on(self) -> None:
        """Renew what is held while progress moves; nothing held longer than the absolute limit is renewed."""
        stream = self.run.config.stream
        while True:
            await asyncio.sleep(stream.lease_ttl_s / 3)
            if self._progress == self._renewed_progress:
                continue
            self._renewed_progress = self._progress
            oldest_s = time.monotonic() - stream.lease_limit_s
            by_stage: dict[Stage, list[str]] = {}
            for lease in self._held.values():
                if lease.taken_s > oldest_s:
                    by_stage.setdefault(lease.entry.stage, []).append(lease.entry.id)
            for stage, ids in by_stage.items():
                await self.broker.renew(stage, self.instance, ids)


@contextlib.asynccontextmanager
async def singleton(worker: Worker) -> AsyncIterator[None]:
    """The lease of a service of which one works and others wait. Safety never rests on it."""
    ttl_s = worker.run.config.stream.lease_ttl_s
    while not await worker.broker.hold(worker.service, worker.instance, ttl_s):
        worker.leave_if_asked()  # but not because the run is closed: the one before may have died before its last word
        with worker.waiting(f"the other {worker.service}"):
            await asyncio.sleep(min(1.0, ttl_s / 4))

    async def keep() -> None:
        last = -1
        while True:
            await asyncio.sleep(ttl_s / 4)
            if worker.progress != last or worker.state == "waiting":  # a hung one loses it
                await worker.broker.hold(worker.service, worker.instance, ttl_s)
            last = worker.progress

    keeper = worker.in_background(keep())
    try:
        yield
    finally:
        await cancel_until_done(keeper)
        with contextlib.suppress(Exception):
            await worker.broker.drop_hold(worker.service, worker.instance)


def _seq(record: Record) -> int:
    if isinstance(record, Prompt):
        return record.seq
    if isinstance(record, Group):
        return record.prompt.seq
    return record.group.prompt.seq
