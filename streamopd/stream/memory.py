"""The stream protocol in memory: for tests and runs in one process. Several clients share one `MemoryStore`.

No method awaits between its first look and its last change, so each is as atomic as a script of `scripts.lua`.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from streamopd.schemas import Event, Fate, Heartbeat, Weights
from streamopd.topology import Stage

from .broker import BatchEntry, Counters, End, Entry, Finished, HandOff, Limits
from .envelope import digest_of, problem_with

T = TypeVar("T")
Fields = dict[str, Any]  # seq, attempt, min_version, digest, size, body; a stranger may have written anything
TYPES = {"seq": int, "attempt": str, "min_version": int, "digest": str, "size": int, "body": bytes}
ATTEMPT = re.compile(r"(\w+)\.(\d+)")


@dataclass
class Stream:
    """Entries in order; of these, who holds which since when."""

    entries: dict[str, Fields] = field(default_factory=dict)
    held: dict[str, tuple[str, float]] = field(default_factory=dict)

    def fresh(self, count: int) -> list[str]:
        return list(itertools.islice((id for id in self.entries if id not in self.held), count))

    def drop(self, id: str) -> None:
        self.entries.pop(id, None)
        self.held.pop(id, None)


@dataclass
class Life:
    """What a wipe loses."""

    boot: str = ""
    process: int = 0                    # the server process that the boot names
    lineage: int = 0
    issued: int = 0
    fated: int = 0
    steps: int = 0
    batchno: int = 0
    committed: tuple[int, int] = (0, 0)
    end: End = ""
    weights: Weights | None = None
    state: dict[int, tuple[str, Stage]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    fates: dict[int, str] = field(default_factory=dict)
    again: list[int] = field(default_factory=list)
    kills: Counter[int | str] = field(default_factory=Counter)
    kept: dict[int, str] = field(default_factory=dict)  # batch number -> entry id, until it is committed
    streams: dict[Stage, Stream] = field(default_factory=lambda: {stage: Stream() for stage in Stage})


class MemoryStore:
    """What a server holds. `clock` gives seconds; the last methods are the faults a test can inject."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, durable: bool = True) -> None:
        self.clock, self.durable = clock, durable
        self.life, self.process = Life(), 1
        self.ids = itertools.count(1)   # never used twice, whatever happens to the content
        self.events: list[tuple[str, Event]] = []
        self.quarantined: list[dict[str, str]] = []
        self.beats: dict[str, Heartbeat] = {}
        self.holds: dict[str, tuple[str, float]] = {}
        self.spent: dict[str, int] = {}
        self.listeners: list[asyncio.Event] = []

    def next_id(self) -> str:
        return f"{next(self.ids)}-0"

    def publish(self) -> None:
        for listener in self.listeners:
            listener.set()

    def wipe(self) -> None:
        self.life = Life()

    def restart(self) -> None:
        self.process += 1

    def snapshot(self) -> Life:
        return copy.deepcopy(self.life)

    def roll_back(self, life: Life) -> None:
        """The server comes up again without its newest writes."""
        self.life = copy.deepcopy(life)
        self.restart()


class MemoryBroker:
    """One client of one run's streams in this process. See `broker.Broker` for what each call promises."""

    def __init__(self, limits: Limits, store: MemoryStore) -> None:
        self.limits, self.store = limits, store
        self._news = asyncio.Event()
        store.listeners.append(self._news)

    async def close_connection(self) -> None:
        if self._news in self.store.listeners:
            self.store.listeners.remove(self._news)

    # ---- identity
    @property
    def _life(self) -> Life:
        return self.store.life

    def _nonce(self) -> str:
        return self._life.boot if self._life.process == self.store.process else ""

    async def boot(self) -> str:
        return self._nonce()

    async def durable(self) -> bool:
        return self.store.durable

    async def counters(self) -> Counters:
        life, stages = self._life, Counter(stage for _, stage in self._life.state.values())
        if not life.boot:
            return Counters()
        return Counters(
            life.boot, bool(self._nonce()), life.issued, life.fated, life.steps, life.batchno, life.end,
            tuple(life.again), {s.stream: len(life.streams[s].entries) for s in Stage},
            {s.stream: len(life.streams[s].held) for s in Stage},
            {s.name.lower(): stages[s] for s in Stage}, self._bytes(), life.weights.n if life.weights else -1,
        )

    async def weights(self) -> Weights | None:
        return self._life.weights

    # ---- feeder
    async def issue(self, boot: str, prompts: Sequence[tuple[int, bytes]]) -> list[str]:
        if refused := self._guard(boot):
            return [refused] * len(prompts)
        words: list[str] = []
        for seq, body in prompts:
            words.append(self._issue(boot, seq, body))
            if words[-1] == "full":
                break
        self.store.publish()
        return words

    def _issue(self, boot: str, seq: int, body: bytes) -> str:
        life = self._life
        min_version = max(0, life.steps - self.limits.max_staleness)
        if seq in life.again:
            life.again.remove(seq)
            self._add(Stage.ISSUED, seq, life.state[seq][0], min_version, body)
            return "done"
        if life.end or seq != life.issued:
            return "already"
        if not self._door_is_open():
            return "full"
        life.state[seq] = (f"{boot}.1", Stage.ISSUED)
        life.issued += 1
        self._add(Stage.ISSUED, seq, f"{boot}.1", min_version, body)
        return "done"

    def _door_is_open(self) -> bool:
        limits, flight = self.limits, self._life.issued - self._life.fated
        room = self._bytes() < limits.cap_bytes or flight < limits.groups_per_step
        return room and flight < (limits.max_staleness + 1) * limits.groups_per_step

    async def drain(self, boot: str, issued: int) -> str:
        life = self._life
        if refused := self._guard(boot):
            return refused
        if not life.end and (life.issued != issued or life.again):
            return "wait"
        life.end = life.end or "drain"
        self.store.publish()
        return "done"

    # ---- generator, teacher
    async def read(
        self, stage: Stage, consumer: str, count: int, block_s: float = 0.0, empty: bool = True
    ) -> list[Entry]:
        def look() -> list[Entry]:
            return self._admit(stage, self._take(stage, consumer, self._life.streams[stage].fresh(count)), empty)

        return await self._until(look, block_s)

    async def own_pending(self, stage: Stage, consumer: str) -> list[Entry]:
        mine = [id for id, (holder, _) in self._life.streams[stage].held.items() if holder == consumer]
        return self._admit(stage, mine, together=True)

    async def hand(self, items: Sequence[HandOff]) -> list[str]:
        if refused := self._guard():
            return [refused] * len(items)
        words = [self._hand(item.entry, item.body) for item in items]
        self.store.publish()
        return words

    def _hand(self, entry: Entry, body: bytes) -> str:
        if entry.boot != self._nonce():
            return "amnesia"
        attempt, stage = self._life.state.get(entry.seq, ("", Stage.BATCHED))
        landed = attempt == entry.attempt and stage <= entry.stage
        if landed:
            following = Stage(entry.stage + 1)
            self._life.state[entry.seq] = (entry.attempt, following)
            self._add(following, entry.seq, entry.attempt, entry.min_version, body)
            self._life.kills.pop(entry.seq, None)
        self._drop(entry.stage, entry.id)
        return "done" if landed else "already"

    async def release(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._put_back(entry.stage, entry.id)
        self.store.publish()

    async def renew(self, stage: Stage, consumer: str, ids: Sequence[str]) -> None:
        stream = self._life.streams[stage]
        for id in ids:
            if id in stream.held and stream.held[id][0] == consumer:
                stream.held[id] = (consumer, self.store.clock())
        if any(id in stream.held and id not in stream.entries for id in ids):
            self._heal(stage)

    async def reap(
        self, stage: Stage, consumer: str, min_idle_s: float, count: int, empty: bool = True
    ) -> list[Entry]:
        if not self._readable():
            return []
        stale = [
            id for id, (holder, since) in self._life.streams[stage].held.items()
            if holder != consumer and self.store.clock() - since >= min_idle_s
        ]
        return self._admit(stage, self._take(stage, consumer, stale[:count]), empty, killed=True)

    # ---- anyone who holds an entry
    async def fate(self, entry: Entry, fate: Fate, reason: str = "") -> str:
        return self._end_of(entry, lambda: self._fated(entry.seq, f"{fate.value}:{reason}" if reason else fate.value))

    async def reissue(self, entry: Entry, reason: str) -> str:
        def go() -> None:
            self._quarantine(entry.stage.stream, reason, b"", entry.seq)
            if int(entry.attempt.rpartition(".")[2]) >= self.limits.convict_after:
                self._fated(entry.seq, f"dead:{reason}")
            else:
                self._issue_again(entry.seq)

        return self._end_of(entry, go)

    def _end_of(self, entry: Entry, change: Callable[[], None]) -> str:
        if refused := self._guard(entry.boot):
            return refused
        same = self._life.state.get(entry.seq) == (entry.attempt, entry.stage)
        if same:
            change()
        self._drop(entry.stage, entry.id)
        self.store.publish()
        return "done" if same else "already"

    async def quarantine(self, source: str, reason: str, head: bytes, seq: int = -1) -> None:
        self._quarantine(source, reason, head, seq)

    async def quarantined(self, count: int = 100) -> list[dict[str, str]]:
        return self.store.quarantined[-count:]

    # ---- packer
    async def sweep(
        self, stage: Stage, consumer: str, known: set[str], count: int, block_s: float = 0.0
    ) -> list[Entry]:
        def look() -> list[Entry]:
            stream = self._life.streams[stage]
            ids = [id for id in stream.held if id not in known][:count]
            return self._admit(stage, self._take(stage, consumer, ids + stream.fresh(count - len(ids))), together=True)

        return await self._until(look, block_s)

    async def close(self, entries: Sequence[Entry], n: int, body: bytes) -> tuple[str, list[str]]:
        assert 0 < len(entries) <= self.limits.groups_per_step, "a step is at most groups_per_step groups"
        life = self._life
        if refused := self._guard(entries[0].boot):
            return refused, []
        current = {e.seq: e.id for e in reversed(entries) if life.state.get(e.seq) == (e.attempt, Stage.SCORED)}
        stale = [e for e in entries if current.get(e.seq) != e.id]
        for entry in stale:
            self._drop(Stage.SCORED, entry.id)
        if all(life.state.get(e.seq) == (e.attempt, Stage.BATCHED) for e in entries):
            return "already", []
        if stale:
            return "stale", [e.id for e in stale]
        if n != life.batchno or (len(entries) < self.limits.groups_per_step and not self._is_rest(entries)):
            return "wait", []
        members = tuple((e.seq, e.attempt) for e in entries)
        life.kept[n] = self.store.next_id()
        life.streams[Stage.BATCHED].entries[life.kept[n]] = {
            "n": n, "members": members, "digest": digest_of(body), "size": len(body), "body": body,
        }
        life.batchno += 1
        for entry in entries:
            life.state[entry.seq] = (entry.attempt, Stage.BATCHED)
            self._drop(Stage.SCORED, entry.id)
        self.store.publish()
        return "done", []

    def _is_rest(self, entries: Collection[Entry]) -> bool:
        waiting = sum(stage < Stage.BATCHED for _, stage in self._life.state.values())
        return self._life.end == "drain" and waiting == len(entries)

    # ---- learner
    async def lead(self, boot: str, lineage: int, restamp: bool) -> str:
        life = self._life
        if not life.boot or life.boot != boot or not (restamp or self._nonce()):
            return "amnesia"
        if life.lineage > lineage:
            return "fenced"
        life.lineage, life.process = lineage, self.store.process
        self.store.publish()
        return "done"

    async def rebuild(
        self, boot: str, lineage: int, n: int, record: Mapping[int, str], manifest: Weights | None
    ) -> str:
        if self._life.lineage > lineage:
            return "fenced"
        if self._nonce() == boot:
            return "done"
        issued = 1 + max(record, default=-1)
        again = [seq for seq in range(issued) if seq not in record]
        self.store.life = Life(
            boot, self.store.process, lineage, issued, len(record), steps=n, batchno=n, committed=(lineage, n),
            weights=manifest, state={seq: (f"{boot}.1", Stage.ISSUED) for seq in again}, again=again,
        )
        self.store.publish()
        return "done"

    async def committed(self) -> tuple[int, int]:
        return self._life.committed

    async def batch(self, n: int, consumer: str, block_s: float = 0.0) -> BatchEntry | None:
        def look() -> BatchEntry | None:
            return self._batch_entry(n, self._life.kept[n]) if n in self._life.kept else None

        return await self._until(look, block_s)

    async def start_batch(self, boot: str, lineage: int, n: int) -> int:
        if self._guard(boot, lineage):
            return 0
        if n in self._life.kept:
            self._life.streams[Stage.BATCHED].held[self._life.kept[n]] = ("learner", self.store.clock())
        self._life.kills[f"b{n}"] += 1
        return self._life.kills[f"b{n}"]

    async def step(
        self, boot: str, lineage: int, n: int, manifest: Weights | None, fates: Sequence[tuple[int, str, Fate]]
    ) -> str:
        life = self._life
        if refused := self._guard(boot, lineage):
            return refused
        life.kills.pop(f"b{n - 1}", None)
        if life.steps >= n:
            return "already"
        life.weights = manifest or life.weights
        for seq, attempt, fate in fates:
            if life.state.get(seq) == (attempt, Stage.BATCHED):
                self._fated(seq, fate.value)
        life.steps = n
        self.store.publish()
        return "done"

    async def commit(self, boot: str, lineage: int, checkpoint: tuple[int, int], seqs: Sequence[int]) -> str:
        life = self._life
        if refused := self._guard(boot, lineage):
            return refused
        for n in [n for n in life.kept if n < checkpoint[1]]:
            self._drop(Stage.BATCHED, life.kept.pop(n))
        for seq in seqs:
            life.fates.pop(seq, None)
        life.committed = max(life.committed, checkpoint)
        self.store.publish()
        return "done"

    async def fates(self) -> dict[int, str]:
        return dict(self._life.fates)

    async def retained_bytes(self) -> int:
        life = self._life
        trained = [id for n, id in life.kept.items() if n < life.steps]
        return sum(life.streams[Stage.BATCHED].entries[id]["size"] for id in trained)

    async def finish(self, boot: str, lineage: int) -> Finished | str:
        if refused := self._guard(boot, lineage):
            return refused
        self._life.end = "closed"
        self.store.publish()
        return Finished(dict(self._life.fates), tuple(sorted(self._life.state)), self._life.issued)

    # ---- side channels
    async def hold(self, name: str, owner: str, ttl_s: float) -> bool:
        holder, until = self.store.holds.get(name, (owner, 0.0))
        if holder != owner and until > self.store.clock():
            return False
        self.store.holds[name] = (owner, self.store.clock() + ttl_s)
        return True

    async def drop_hold(self, name: str, owner: str) -> None:
        if self.store.holds.get(name, ("", 0.0))[0] == owner:
            del self.store.holds[name]

    async def spend(self, name: str, tokens: int) -> int:
        self.store.spent[name] = self.store.spent.get(name, 0) + tokens
        return self.store.spent[name]

    async def beat(self, beat: Heartbeat) -> None:
        self.store.beats[beat.instance] = beat

    async def beats(self) -> list[Heartbeat]:
        return list(self.store.beats.values())

    async def emit(self, event: Event) -> None:
        self.store.events.append((self.store.next_id(), event))

    async def events(self, after: str = "0", count: int = 1000) -> list[tuple[str, Event]]:
        start = int(after.partition("-")[0])
        return [(id, event) for id, event in self.store.events if int(id.partition("-")[0]) > start][:count]

    async def news(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):  # wait_for loses a cancellation that comes with the news
                await self._news.wait()
        except TimeoutError:
            return
        self._news.clear()

    # ---- how
    def _guard(self, boot: str | None = None, lineage: int | None = None) -> str:
        """Why this call may change nothing, or ""; `lineage` marks the learner's."""
        if not self._nonce() or (boot is not None and boot != self._nonce()):
            return "amnesia"
        if lineage is None:
            return "closed" if self._life.end == "closed" else ""
        return "" if lineage == self._life.lineage else "fenced"

    def _readable(self) -> bool:
        return bool(self._nonce()) and self._life.end != "closed"

    async def _until(self, look: Callable[[], T], block_s: float) -> T:
        """What `look` finds, looked for at each piece of news for at most `block_s`."""
        deadline = asyncio.get_running_loop().time() + block_s
        while True:
            found = look()
            left = deadline - asyncio.get_running_loop().time()
            if found or left <= 0:
                return found
            await self.news(left)

    def _bytes(self) -> int:
        return sum(self._life.sizes.values())

    def _add(self, stage: Stage, seq: int, attempt: str, min_version: int, body: bytes) -> None:
        self._life.sizes[seq] = len(body)
        self._life.streams[stage].entries[self.store.next_id()] = {
            "seq": seq, "attempt": attempt, "min_version": min_version, "digest": digest_of(body), "size": len(body),
            "body": body,
        }

    def _drop(self, stage: Stage, id: str) -> None:
        self._life.streams[stage].drop(id)

    def _put_back(self, stage: Stage, id: str) -> None:
        stream = self._life.streams[stage]
        if stream.held.pop(id, None):
            stream.entries[self.store.next_id()] = stream.entries.pop(id)

    def _fated(self, seq: int, why: str) -> None:
        life = self._life
        del life.state[seq]
        life.fates[seq] = why
        life.fated += 1
        life.kills.pop(seq, None)
        life.sizes.pop(seq, None)

    def _issue_again(self, seq: int) -> None:
        boot, _, k = self._life.state[seq][0].rpartition(".")
        self._life.state[seq] = (f"{boot}.{int(k) + 1}", Stage.ISSUED)
        self._life.sizes.pop(seq, None)
        self._life.again.append(seq)

    def _quarantine(self, source: str, reason: str, head: bytes, seq: int) -> None:
        text = head[:1024].decode("utf-8", "backslashreplace")
        self.store.quarantined.append({"source": source, "reason": reason, "seq": str(seq), "head": text})

    def _take(self, stage: Stage, consumer: str, ids: Sequence[str]) -> list[str]:
        """Deliver these to `consumer`, whoever held them."""
        if not self._readable():
            return []
        for id in ids:
            self._life.streams[stage].held[id] = (consumer, self.store.clock())
        return list(ids)

    def _admit(
        self, stage: Stage, ids: Sequence[str], empty: bool = True, killed: bool = False, together: bool = False
    ) -> list[Entry]:
        """Of delivered entries those this reader may work on; what nobody can use leaves, its head in quarantine."""
        kept: list[Entry] = []
        garbage = False
        for id in ids:
            fields = self._life.streams[stage].entries.get(id)
            if fields is None:  # somebody deleted it
                garbage = True
                self._drop(stage, id)
            elif not _is_shaped(fields):
                garbage = True
                self._refuse(stage, id, "fields are absent or malformed")
            elif self._life.state.get(fields["seq"]) != (fields["attempt"], stage):
                self._refuse(stage, id, "no such group waits here: a copy, an attempt that was given up, or a stranger")
            elif entry := self._judge(stage, id, fields, killed):
                alone = not together and (any(e.alone for e in kept) or (entry.alone and (bool(kept) or not empty)))
                self._put_back(stage, id) if alone else kept.append(entry)
        if garbage:
            self._heal(stage)
        return kept

    def _judge(self, stage: Stage, id: str, fields: Fields, killed: bool) -> Entry | None:
        """The entry, or None when its third kill convicts it."""
        seq, limit = fields["seq"], self.limits.convict_after
        self._life.kills[seq] += killed
        kills = self._life.kills[seq]
        if killed and kills >= limit:
            why = f"killed its consumer {kills} times, the last time alone"
            self._quarantine(stage.stream, why, fields["body"], seq)
            self._fated(seq, "dead:killed its consumer")
            self._drop(stage, id)
            return None
        problem = problem_with(fields["body"], fields["size"], fields["digest"], self.limits.max_record_bytes)
        body = b"" if problem else fields["body"]
        return Entry(id, stage, seq, fields["attempt"], fields["min_version"], body, kills >= limit - 1, problem)

    def _refuse(self, stage: Stage, id: str, reason: str) -> None:
        fields = self._life.streams[stage].entries[id]
        head = fields.get("body")
        self._quarantine(stage.stream, reason, head if isinstance(head, bytes) else b"", fields.get("seq", -1))
        self._drop(stage, id)

    def _heal(self, stage: Stage) -> None:
        """A group whose only entry was deleted or damaged is issued again."""
        there = {(f.get("seq"), f.get("attempt")) for f in self._life.streams[stage].entries.values()}
        waiting = self._life.again if stage == Stage.ISSUED else []
        for seq, (attempt, at) in list(self._life.state.items()):
            if at == stage and (seq, attempt) not in there and seq not in waiting:
                self._quarantine(stage.stream, "its entry was deleted or damaged; issued again", b"", seq)
                self._issue_again(seq)

    def _batch_entry(self, n: int, id: str) -> BatchEntry:
        fields = self._life.streams[Stage.BATCHED].entries.get(id)
        if fields is None:
            return BatchEntry(id, n, (), b"", "the entry was deleted")
        problem = problem_with(fields["body"], fields["size"], fields["digest"], self.limits.max_record_bytes)
        return BatchEntry(id, n, fields["members"], b"" if problem else fields["body"], problem)


def _is_shaped(fields: Fields) -> bool:
    if {name: type(value) for name, value in fields.items()} != TYPES:
        return False
    numbers = fields["seq"], fields["min_version"], fields["size"]
    return min(numbers) >= 0 and bool(ATTEMPT.fullmatch(fields["attempt"]))
