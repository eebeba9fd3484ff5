"""Whole runs in small: services that speak to a broker through its interface only, faults between any two moves, an oracle.

A service is an async generator: it pauses after each call. The scheduler resumes one at random, so a crash can fall
between any two calls; after each move the broker's content is held against the invariants, at the end the accounts
against the oracle: the learner's "weights" are the very list of groups trained into them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec

from streamopd.errors import StreamError
from streamopd.schemas import Fate, Weights
from streamopd.stream.broker import Broker, Entry, Finished, HandOff
from streamopd.topology import Stage

from .benches import Bench, View

Service = AsyncIterator[None]
IDLE_S = 60.0
RUN = "history"


class Violation(AssertionError):
    """An invariant that does not hold."""


class Killed(Exception):
    """A poisonous item took its consumer down."""


def need(holds: object, what: str) -> None:
    if not holds:
        raise Violation(what)


@dataclass(frozen=True)
class Setup:
    """One configuration. `faults` is a budget; once it is spent the run must end by itself."""

    groups: int = 12
    save_steps: int = 2
    max_age: int = 99
    max_steps: int = 10**9
    generators: int = 2
    teachers: int = 2
    at_once: int = 2
    faults: int = 6
    kinds: tuple[str, ...] = ("crash", "lost", "second", "suspect", "wipe", "lose checkpoint", "spoil")
    durable: bool = False
    filtered: frozenset[int] = frozenset()
    poison: frozenset[tuple[str, int]] = frozenset()  # (service, seq): working on it kills that service
    stop_at_move: int = 10**9                         # Ctrl-C
    skip_weights: bool = False                        # the learner may find no free weight slot
    moves: int = 8000
    rate: float = 0.03                                # faults a move, while the budget lasts


@dataclass
class Checkpoint:
    boot: str
    digest: int
    record: dict[int, str]
    trained: tuple[int, ...]
    done: bool = False
    unused: tuple[int, ...] = ()
    fed: int = 0


@dataclass
class Actor:
    """A running service and the client it speaks through."""

    kind: str
    name: str
    life: Service
    line: Flaky
    pace: float


class Flaky:
    """A broker whose next reply can be lost: the call runs, its caller sees an error."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.armed = False

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.broker, name)
        if not callable(attribute):
            return attribute

        async def call(*args: Any, **kwargs: Any) -> Any:
            answer = await attribute(*args, **kwargs)
            if self.armed and name not in ("counters", "weights", "boot"):
                self.armed = False
                raise StreamError(f"the reply of {name} was lost")
            return answer

        return call


class World:
    """The disk, the processes, the faults."""

    def __init__(self, bench: Bench, setup: Setup, seed: int) -> None:
        self.bench, self.setup, self.random = bench, setup, random.Random(seed)
        self.budget = setup.faults
        self.checkpoints: dict[tuple[int, int], Checkpoint] = {(0, 0): Checkpoint("", 7, {}, ())}
        self.lineage = 0
        self.nonces = 0
        self.births = 0
        self.actors: list[Actor] = []
        self.snapshots: list[Any] = []
        self.digests: dict[tuple[str, int], int] = {}       # (boot, batch) -> weights it gave
        self.short: dict[str, int] = {}                     # boot -> its batch that was smaller than a step
        self.excuse = True                                  # a rebuild is called for
        self.innocent_kills = 0                             # kills that no poison explains
        self.stopping = False
        self.done = False
        self.log: list[str] = []
        self.counts: Counter[str] = Counter()

    async def start(self, kind: str) -> None:
        self.births += 1
        line = Flaky(await self.bench.client())
        name = f"{kind}-{self.births}"
        pace = self.random.choice([0.2, 1, 1, 3])
        self.actors.append(Actor(kind, name, SERVICES[kind](self, line, name), line, pace))

    async def play(self) -> Counter[str]:
        """From the first start to the end; Violation with the last moves otherwise."""
        setup = self.setup
        for kind in ["feeder", "packer", "learner"] + ["generator"] * setup.generators + ["teacher"] * setup.teachers:
            await self.start(kind)
        try:
            for move in range(setup.moves):
                self.stopping = self.stopping or move >= setup.stop_at_move
                if self.budget and self.random.random() < setup.rate:
                    await self.fault()
                await self.move()
                if self.done:
                    return self.counts
                if move % self.check_every == 0:
                    await self.check()
            raise Violation(f"no end after {setup.moves} moves")
        except Violation as broken:
            raise Violation(f"{broken}; the last moves: " + " · ".join(self.log[-40:])) from None

    check_every = 1

    async def move(self) -> None:
        actor = self.random.choices(self.actors, [a.pace for a in self.actors])[0]
        try:
            self.log.append(actor.name)
            await actor.life.__anext__()
        except StopAsyncIteration:
            self.actors.remove(actor)
            if not self.done and not self.others(actor):
                await self.start(actor.kind)
        except Killed:
            await self.kill(actor)

    def others(self, actor: Actor) -> list[Actor]:
        return [a for a in self.actors if a.kind == actor.kind and a is not actor]

    async def kill(self, actor: Actor) -> None:
        """SIGKILL, and its supervisor starts another; what it held goes stale."""
        self.actors.remove(actor)
        await self.forget(actor)
        await self.start(actor.kind)

    async def forget(self, actor: Actor) -> None:
        for stage in (Stage.ISSUED, Stage.GENERATED):
            await self.bench.abandon(stage, actor.name)

    # ---- faults
    async def fault(self) -> None:
        kind = self.random.choice(self.setup.kinds)
        if await FAULTS[kind](self):
            self.budget -= 1
            self.counts[kind] += 1
            self.log.append(kind.upper())

    async def crash(self) -> bool:
        actor = self.random.choice(self.actors)
        self.innocent_kills += 1
        await self.kill(actor)
        return True

    async def lose_reply(self) -> bool:
        self.random.choice(self.actors).line.armed = True
        return True

    async def second(self) -> bool:
        """Another singleton while the first stands wherever it stands."""
        kind = self.random.choice(["feeder", "packer", "learner"])
        if sum(a.kind == kind for a in self.actors) > 1:
            return False
        await self.start(kind)
        return True

    async def suspect(self) -> bool:
        """A live replica made no progress for too long: others take what it holds."""
        self.innocent_kills += 1
        await self.forget(self.random.choice([a for a in self.actors if a.kind in ("generator", "teacher")]))
        return True

    async def wipe(self) -> bool:
        self.excuse = True
        await self.bench.wipe()
        return True

    async def restart(self) -> bool:
        self.excuse = self.excuse or not self.setup.durable
        await self.bench.restart()
        return True

    async def roll_back(self) -> bool:
        """The newest writes are gone, another process answers."""
        if self.snapshots and self.random.random() < 0.5:
            self.excuse = True
            await self.bench.roll_back(self.snapshots.pop())
            self.snapshots.clear()
            return True
        self.snapshots.append(await self.bench.snapshot())
        return False

    async def lose_checkpoint(self) -> bool:
        learners = [a for a in self.actors if a.kind == "learner"]
        if len(self.checkpoints) < 2 or len(learners) > 1:
            return False
        del self.checkpoints[max(self.checkpoints)]
        self.excuse = True
        await self.kill(learners[0])
        return True

    async def spoil(self) -> bool:
        """The payload of an undelivered entry is not what was written."""
        view = await self.bench.view()
        candidates = [(stage, seq) for stage, _, seq, _ in view.entries if seq in view.state]
        if not candidates:
            return False
        stage, seq = self.random.choice(candidates)
        await self.bench.spoil(Stage(stage), seq, body=b"spoiled")
        self.innocent_kills += 1  # three spoiled attempts are dead by the rule
        return True

    # ---- the disk
    def grant(self) -> int:
        self.lineage += 1
        return self.lineage

    def save(self, at: tuple[int, int], checkpoint: Checkpoint) -> None:
        trained = {seq for seq, why in checkpoint.record.items() if why == "trained"}
        need(trained == set(checkpoint.trained), f"the record says {trained}, the weights hold {checkpoint.trained}")
        self.checkpoints[at] = checkpoint
        for old in sorted(self.checkpoints)[:-2]:
            del self.checkpoints[old]
        if checkpoint.done:
            self.finish(checkpoint)

    def finish(self, final: Checkpoint) -> None:
        need(not set(final.unused) & set(final.record), f"unused {final.unused} and fated {final.record}")
        need(len(final.record) + len(final.unused) == final.fed, f"fed {final.fed}, fated {len(final.record)}, "
             f"unused {len(final.unused)}")
        whole = final.fed == self.setup.groups and not final.unused
        early = self.stopping or self.setup.max_steps < 10**9
        need(whole or early, f"ended with {final.fed} fed and {final.unused} unused of {self.setup.groups}")
        self.counts.update(why.partition(":")[0] for why in final.record.values())
        self.done = True

    # ---- invariants of every reachable state
    async def check(self) -> None:
        view = await self.bench.view()
        if not view.boot or not view.stamped:
            return
        limits, setup = self.bench.limits, self.setup
        window = (limits.max_staleness + 1) * limits.groups_per_step
        need(view.issued == len(view.state) + view.fated, f"I1: issued {view.issued}, {len(view.state)} in flight, "
             f"{view.fated} fated")
        need(len(view.state) <= window, f"I4: {len(view.state)} in flight, window {window}")
        retained = setup.save_steps + limits.max_staleness + 2
        need(len(view.batches) <= retained, f"I10: {len(view.batches)} batches retained")
        valid = Counter(valid_entries(view))
        need(all(valid[seq] == 1 for seq in view.state), f"I6: in flight {view.state}, valid entries {dict(valid)}")
        need(set(valid) <= set(view.state), f"I6: {dict(valid)} beside {view.state}")
        guilty = {seq for _, seq in setup.poison}
        dead = {seq for seq, why in view.fates.items() if why.startswith("dead")}
        need(self.innocent_kills or dead <= guilty, f"I11: {dead} dead, {guilty} guilty")


def valid_entries(view: View) -> list[int]:
    """The seqs that some stream, batch or list can bring on, once for each way."""
    moving = [seq for stage, _, seq, attempt in view.entries if view.state.get(seq) == (attempt, stage)]
    batched = [seq for members in view.batches.values() for seq, attempt in members
               if view.state.get(seq) == (attempt, Stage.BATCHED)]
    return view.again + moving + batched


# ------------------------------------------------------------------------------------------------- the services
async def feeder(world: World, broker: Any, name: str) -> Service:
    while True:
        try:
            seen = await broker.counters()
            yield
            if not seen.stamped or seen.end == "closed":
                continue
            new = range(seen.issued, min(seen.issued + 2, world.setup.groups)) if not seen.end else ()
            prompts = [(seq, b"p%d" % seq) for seq in (*seen.again[:2], *new)]
            if prompts:
                await broker.issue(seen.boot, prompts)
            elif not seen.end:
                await broker.drain(seen.boot, world.setup.groups)
        except StreamError:
            pass
        yield


async def generator(world: World, broker: Any, name: str) -> Service:
    held: dict[str, Entry] = {}
    served: Weights | None = None
    while True:
        try:
            newest = await broker.weights()
            yield
            if newest and (not served or newest.boot != served.boot or newest.n > served.n):
                slow = served and newest.boot == served.boot and world.random.random() < 0.5
                served = served if slow else newest
            seen = await broker.counters()
            yield
            if not served or served.boot != seen.boot or not seen.stamped:
                continue
            held = {id: e for id, e in held.items() if e.boot == seen.boot}
            if served.n >= seen.steps - broker.limits.max_staleness:
                for fresh in await take(world, broker, Stage.ISSUED, name, held):
                    held[fresh.id] = fresh
                yield
            ready = [e for e in held.values() if e.boot == served.boot and served.n >= e.min_version]
            for entry in [e for e in held.values() if e.problem]:
                settle(held, [entry], [await broker.reissue(entry, entry.problem)])
                yield
            behind = [e for e in held.values() if not e.problem and e not in ready]
            if behind:
                await broker.release(behind)
                settle(held, behind, ["done"] * len(behind))
                yield
            ready = [e for e in ready if e.id in held and not e.problem]
            need(all(e.body == b"p%d" % e.seq for e in ready), "a prompt under another seq")
            poisoned(world, "generator", ready)
            if ready:
                settle(held, ready, await broker.hand([HandOff(e, answer(e.seq, served)) for e in ready]))
                yield
        except StreamError:
            held = {e.id: e for e in await own(broker, Stage.ISSUED, name)}
            yield


async def teacher(world: World, broker: Any, name: str) -> Service:
    held: dict[str, Entry] = {}
    while True:
        try:
            seen = await broker.counters()
            yield
            held = {id: e for id, e in held.items() if e.boot == seen.boot}
            for fresh in await take(world, broker, Stage.GENERATED, name, held):
                held[fresh.id] = fresh
            yield
            for entry in [e for e in held.values() if e.problem]:
                settle(held, [entry], [await broker.reissue(entry, entry.problem)])
                yield
            ready = [e for e in held.values() if not e.problem]
            poisoned(world, "teacher", ready)
            if ready:
                settle(held, ready, await broker.hand([HandOff(e, e.body) for e in ready]))
                yield
        except StreamError:
            held = {e.id: e for e in await own(broker, Stage.GENERATED, name)}
            yield


def settle(held: dict[str, Entry], entries: list[Entry], words: list[str]) -> None:
    """Done with these; "amnesia" of my own boot only means that the server awaits its stamp."""
    for entry, word in zip(entries, words, strict=True):
        if word != "amnesia":
            held.pop(entry.id, None)


async def take(world: World, broker: Any, stage: Stage, name: str, held: dict[str, Entry]) -> list[Entry]:
    """New entries or, as often, what others left lying."""
    room = world.setup.at_once - len(held)
    if room < 1 or any(e.alone for e in held.values()):
        return []
    if world.random.random() < 0.5:
        return await broker.reap(stage, name, IDLE_S, room, empty=not held)
    return await broker.read(stage, name, room, empty=not held)


async def own(broker: Any, stage: Stage, name: str) -> list[Entry]:
    """After an error: what is really mine; an item to be served alone goes back when there is more."""
    entries: list[Entry] = await broker.own_pending(stage, name)
    if len(entries) > 1 and any(e.alone for e in entries):
        await broker.release([e for e in entries if e.alone])
    return [e for e in entries if not e.alone or len(entries) == 1]


def poisoned(world: World, kind: str, entries: list[Entry]) -> None:
    if any((kind, e.seq) in world.setup.poison for e in entries):
        raise Killed


def answer(seq: int, weights: Weights) -> bytes:
    return msgspec.json.encode((seq, weights.n, int(weights.folder)))


async def packer(world: World, broker: Any, name: str) -> Service:
    buffer: dict[str, Entry] = {}
    while True:
        try:
            seen = await broker.counters()
            yield
            buffer = {id: e for id, e in buffer.items() if e.boot == seen.boot}
            if len(buffer) < broker.limits.groups_per_step:
                room = broker.limits.groups_per_step - len(buffer)
                for entry in await broker.sweep(Stage.SCORED, name, set(buffer), room):
                    buffer[entry.id] = entry
                yield
            for entry in list(buffer.values()):
                if entry.problem or entry.seq in world.setup.filtered:
                    await (broker.reissue(entry, entry.problem) if entry.problem
                           else broker.fate(entry, Fate.FILTERED, "asked"))
                    del buffer[entry.id]
                    yield
            if buffer and (len(buffer) == broker.limits.groups_per_step or seen.end == "drain"):
                members = list(buffer.values())
                body = msgspec.json.encode([msgspec.json.decode(e.body) for e in members])
                word, stale = await broker.close(members, seen.batchno, body)
                yield
                if word in ("done", "already"):
                    buffer = {}
                buffer = {id: e for id, e in buffer.items() if id not in stale}
        except StreamError:
            pass
        yield


async def learner(world: World, broker: Any, name: str) -> Service:
    """`Learner` with its one exit: fenced."""
    try:
        async for _ in Learner(world, broker).life():
            yield
    except Fenced:
        return


class Fenced(Exception): ...


class Learner:
    def __init__(self, world: World, broker: Any) -> None:
        self.world, self.broker = world, broker
        self.lineage = world.grant()
        self.boot, self.n, self.digest = "", 0, 7
        self.record: dict[int, str] = {}
        self.trained: tuple[int, ...] = ()
        self.base = (0, 0)

    async def life(self) -> Service:
        async for _ in self.join():
            yield
        while not self.world.done:
            try:
                seen = await self.broker.counters()
                yield
                if seen.boot != self.boot or not seen.stamped:
                    async for _ in self.lost():
                        yield
                    continue
                setup = self.world.setup
                over = (self.n >= setup.max_steps or self.world.stopping or seen.end == "closed"
                        or (seen.end == "drain" and seen.issued == seen.fated))
                async for _ in self.end() if over and self.n == seen.steps else self.train():
                    yield
            except StreamError:
                yield  # every call of the loop may be repeated: look again

    async def join(self) -> Service:
        """Fence the one before me, then read the disk."""
        world = self.world
        while True:
            try:
                seen = await self.broker.counters()
                yield
                if seen.boot:
                    self.leave_if(await self.broker.lead(seen.boot, self.lineage, world.setup.durable))
                    yield
                break
            except StreamError:
                yield
        self.base = max(world.checkpoints)
        saved = world.checkpoints[self.base]
        yield
        self.boot, self.n, self.digest = saved.boot, self.base[1], saved.digest
        self.record, self.trained = dict(saved.record), saved.trained
        while True:
            try:
                same = saved.boot and await self.broker.boot() == saved.boot
                intact = same and self.base >= await self.broker.committed()
                yield
                if not intact:
                    need(world.excuse or not same or self.lineage != world.lineage, "an uncalled-for rebuild")
                    async for _ in self.rebuild():
                        yield
                elif await self.broker.commit(self.boot, self.lineage, self.base, list(self.record)) == "fenced":
                    raise Fenced
                return
            except StreamError:
                yield

    def leave_if(self, word: str) -> None:
        if word == "fenced":
            raise Fenced

    async def rebuild(self) -> Service:
        world = self.world
        world.nonces += 1
        boot = f"boot{world.nonces}"
        while True:
            try:
                word = await self.broker.rebuild(boot, self.lineage, self.n, self.record, self.manifest(boot))
                break
            except StreamError:
                yield
        self.leave_if(word)
        world.excuse = world.excuse and self.lineage != world.lineage
        self.boot = boot
        yield

    def manifest(self, boot: str) -> Weights:
        return Weights(run=RUN, boot=boot, n=self.n, folder=str(self.digest))

    async def lost(self) -> Service:
        """Another life of the broker answers, or another process."""
        if self.lineage != self.world.lineage:
            raise Fenced
        seen = await self.broker.counters()
        yield
        if seen.boot == self.boot and self.world.setup.durable:
            self.leave_if(await self.broker.lead(self.boot, self.lineage, True))
            yield
        else:
            async for _ in self.rebuild():
                yield

    async def train(self) -> Service:
        world, broker = self.world, self.broker
        batch = await broker.batch(self.n, "learner")
        yield
        if batch is None or batch.boot != self.boot:
            return
        starts = await broker.start_batch(self.boot, self.lineage, self.n)
        yield
        if starts > 3:
            self.record |= dict.fromkeys((seq for seq, _ in batch.members), "dead:kills the learner")
            world.excuse = True
            async for _ in self.rebuild():
                yield
            return
        if any(("learner", seq) in world.setup.poison for seq, _ in batch.members):
            raise Killed
        need(not batch.problem, f"batch {self.n} cannot be read: {batch.problem}")
        fates, boot = self.absorb(batch), self.boot
        skip = world.setup.skip_weights and world.random.random() < 0.3
        word = "amnesia"
        while word == "amnesia" and self.boot == boot:  # after a mere restart the same step is still owed
            try:
                manifest = self.manifest(self.boot)
                seen = await broker.counters()
                if skip and self.n - seen.weights_n <= broker.limits.max_staleness:
                    manifest = None
                word = await broker.step(self.boot, self.lineage, self.n, manifest, fates)
                yield
                if word == "amnesia":
                    async for _ in self.lost():
                        yield
            except StreamError:
                yield
        self.leave_if(word)
        if self.n - self.base[1] >= world.setup.save_steps:
            async for _ in self.checkpoint():
                yield

    def absorb(self, batch: Any) -> list[tuple[int, str, Fate]]:
        """One optimizer step: the groups of the batch become part of the weights."""
        world, limits = self.world, self.broker.limits
        groups = msgspec.json.decode(batch.body, type=list[tuple[int, int, int]])
        need([g[0] for g in groups] == [seq for seq, _ in batch.members], "a batch whose body is not its members")
        if len(groups) < limits.groups_per_step:
            world.short[self.boot] = self.n
        need(self.n <= world.short.get(self.boot, self.n), f"step {self.n} after the short last one")
        need(not {g[0] for g in groups} & set(self.record), f"I2: batch {groups} overlaps the record")
        fates, kept = [], []
        for (seq, version, digest), (_, attempt) in zip(groups, batch.members, strict=True):
            age = self.n - version
            need(age >= 0, f"I17: group {seq} is of weights {version} at step {self.n}")
            if limits.max_staleness == 0:
                need((version, digest) == (self.n, self.digest), f"S = 0: group {seq} of {version} at step {self.n}")
            kept += [seq] if age <= world.setup.max_age else []
            fates.append((seq, attempt, Fate.TRAINED if age <= world.setup.max_age else Fate.EXPIRED))
        need(not set(kept) & set(self.trained), f"I2: trained twice: {kept}")
        if kept:
            self.digest = random.Random(repr((self.digest, groups))).getrandbits(48)
        before = world.digests.setdefault((self.boot, self.n), self.digest)
        need(before == self.digest, f"I3: batch {self.n} trained again gives other weights")
        self.trained += tuple(kept)
        self.record |= {seq: fate.value for seq, _, fate in fates}
        self.n += 1
        return fates

    async def checkpoint(self) -> Service:
        fates = await self.broker.fates()
        if await self.broker.boot() != self.boot:
            return
        self.adopt(fates)
        self.base = (self.lineage, self.n)
        self.world.save(self.base, Checkpoint(self.boot, self.digest, dict(self.record), self.trained))
        yield
        word, boot = "amnesia", self.boot
        while word == "amnesia" and self.boot == boot:
            try:
                word = await self.broker.commit(self.boot, self.lineage, self.base, list(self.record))
                yield
                if word == "amnesia":
                    async for _ in self.lost():
                        yield
            except StreamError:
                yield
        self.leave_if(word)

    def adopt(self, fates: dict[int, str]) -> None:
        """The others' fates; what I trained I know better."""
        self.record |= {seq: why for seq, why in fates.items() if why not in ("trained", "expired")}

    async def end(self) -> Service:
        account = await self.broker.finish(self.boot, self.lineage)
        yield
        if not isinstance(account, Finished):
            self.leave_if(account)
            return
        self.adopt(account.fates)
        last = Checkpoint(self.boot, self.digest, dict(self.record), self.trained, True, account.unused, account.issued)
        if self.lineage == self.world.lineage:
            self.world.save((self.lineage, self.n), last)
        yield


SERVICES: dict[str, Any] = {
    "feeder": feeder, "generator": generator, "teacher": teacher, "packer": packer, "learner": learner,
}
FAULTS: dict[str, Any] = {
    "crash": World.crash, "lost": World.lose_reply, "second": World.second, "suspect": World.suspect,
    "wipe": World.wipe, "restart": World.restart, "roll back": World.roll_back,
    "lose checkpoint": World.lose_checkpoint, "spoil": World.spoil,
}
