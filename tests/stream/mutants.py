"""The protocol with one rule broken each, and a setup in which that must show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from streamopd.schemas import Fate, Weights
from streamopd.stream.broker import Entry, Limits
from streamopd.stream.memory import MemoryBroker
from streamopd.topology import Stage

from .histories import Setup


class NoCompare(MemoryBroker):
    """XADD and XACK without looking at the state."""

    def _hand(self, entry: Entry, body: bytes) -> str:
        following = Stage(entry.stage + 1)
        self._life.state[entry.seq] = (entry.attempt, following)
        self._add(following, entry.seq, entry.attempt, entry.min_version, body)
        self._drop(entry.stage, entry.id)
        return "done"


class NoAttempt(MemoryBroker):
    """The hand-off's compare ignores the attempt."""

    def _hand(self, entry: Entry, body: bytes) -> str:
        attempt, stage = self._life.state.get(entry.seq, ("", Stage.BATCHED))
        if attempt and stage <= entry.stage:
            self._life.state[entry.seq] = (entry.attempt, stage)
        return super()._hand(entry, body)


class SameAttempt(MemoryBroker):
    """An issue after an unreadable payload keeps its attempt number."""

    def _issue_again(self, seq: int) -> None:
        attempt = self._life.state[seq][0]
        super()._issue_again(seq)
        self._life.state[seq] = (attempt, Stage.ISSUED)


class WindowOfCheckpoints(MemoryBroker):
    """The window counts groups until a checkpoint, not until their fate."""

    def _door_is_open(self) -> bool:
        kept, self._life.fated = self._life.fated, self._life.fated - len(self._life.fates)
        try:
            return super()._door_is_open()
        finally:
            self._life.fated = kept


class CapBelowAStep(MemoryBroker):
    """The byte cap may close the door below one step."""

    def _door_is_open(self) -> bool:
        return self._bytes() < self.limits.cap_bytes and super()._door_is_open()


class FateKeepsState(MemoryBroker):
    """A fate leaves state[seq] behind."""

    def _fated(self, seq: int, why: str) -> None:
        held = self._life.state[seq]
        super()._fated(seq, why)
        self._life.state[seq] = held


class CloseEach(MemoryBroker):
    """A batch is closed member by member: what is stale is left out."""

    async def close(self, entries: Sequence[Entry], n: int, body: bytes) -> tuple[str, list[str]]:
        word, stale = await super().close(entries, n, body)
        rest = [entry for entry in entries if entry.id not in stale]
        if word != "stale" or not rest:
            return word, stale
        limits, self.limits = self.limits, Limits(len(rest), self.limits.max_staleness)
        try:
            return await super().close(rest, n, msgspec.json.encode([msgspec.json.decode(e.body) for e in rest]))
        finally:
            self.limits = limits


class EarlyFlush(MemoryBroker):
    """At the end of the data the packer's buffer is closed without waiting for the rest of the flight."""

    def _is_rest(self, entries: Any) -> bool:
        return self._life.end == "drain"


class FatesFirst(MemoryBroker):
    """Fates are written before the weights, in another call."""

    owed: Weights | None = None

    async def step(
        self, boot: str, lineage: int, n: int, manifest: Weights | None, fates: Sequence[tuple[int, str, Fate]]
    ) -> str:
        word = await super().step(boot, lineage, n, None, fates)
        self.owed = manifest if word == "done" else None
        return word

    async def counters(self) -> Any:
        if self.owed and self._nonce() == self.owed.boot:
            self._life.weights = self.owed
        self.owed = None
        return await super().counters()


class BlameAll(MemoryBroker):
    """Whatever a dead consumer held is blamed; nothing is run alone."""

    def _judge(self, stage: Stage, id: str, fields: dict[str, Any], killed: bool) -> Entry | None:
        entry = super()._judge(stage, id, fields, killed)
        return entry and Entry(*(getattr(entry, name) for name in entry.__struct_fields__[:6]), False)


class NoMinVersion(MemoryBroker):
    """Prompts without min_version."""

    def _add(self, stage: Stage, seq: int, attempt: str, min_version: int, body: bytes) -> None:
        super()._add(stage, seq, attempt, 0, body)


class NoRunId(MemoryBroker):
    """The boot is a key only: a lost tail goes unseen."""

    def _nonce(self) -> str:
        return self._life.boot


class NoLineage(MemoryBroker):
    """An older learner is not fenced."""

    def _guard(self, boot: str | None = None, lineage: int | None = None) -> str:
        return super()._guard(boot, None if lineage is None else self._life.lineage)


class IssueNext(MemoryBroker):
    """A repeated issue takes the next seq, with this seq's prompt."""

    def _issue(self, boot: str, seq: int, body: bytes) -> str:
        return super()._issue(boot, seq if seq in self._life.again else self._life.issued, body)


class PruneAll(MemoryBroker):
    """A commit forgets all fates, also those that its checkpoint does not hold."""

    async def commit(self, boot: str, lineage: int, checkpoint: tuple[int, int], seqs: Sequence[int]) -> str:
        return await super().commit(boot, lineage, checkpoint, [*seqs, *self._life.fates])


class AckEarly(MemoryBroker):
    """Batches are acked when their step is done, before a checkpoint holds them."""

    async def step(
        self, boot: str, lineage: int, n: int, manifest: Weights | None, fates: Sequence[tuple[int, str, Fate]]
    ) -> str:
        word = await super().step(boot, lineage, n, manifest, fates)
        for old in [k for k in self._life.kept if k < n]:
            self._drop(Stage.BATCHED, self._life.kept.pop(old))
        return word


class LateHolders(MemoryBroker):
    """A packer keeps what it read: another one never takes it over."""

    async def sweep(
        self, stage: Stage, consumer: str, known: set[str], count: int, block_s: float = 0.0
    ) -> list[Entry]:
        held = self._life.streams[stage].held
        others = {id for id, (holder, _) in held.items() if holder != consumer}
        return await super().sweep(stage, consumer, known | others, count, block_s)


@dataclass(frozen=True)
class Mutant:
    kind: type[MemoryBroker]
    setup: Setup
    limits: Limits
    seed: int  # one that shows it soon


def mutant(
    kind: type[MemoryBroker], kinds: str, per_step: int = 2, staleness: int = 1, cap: int = 1 << 30,
    seed: int = 0, **setup: Any,
) -> Mutant:
    faults = setup.pop("faults", 12 if kinds else 0)
    setup = {"groups": 16, "moves": 6000, "rate": 0.04} | setup
    return Mutant(kind, Setup(faults=faults, kinds=tuple(kinds.split(",")), **setup), Limits(per_step, staleness, cap), seed)


MUTANTS = [
    mutant(NoCompare, "crash,lost,suspect", seed=5, rate=0.2, faults=30),
    mutant(NoAttempt, "spoil,suspect", seed=16, rate=0.4, faults=60),
    mutant(SameAttempt, "spoil,suspect", seed=5, rate=0.3, faults=40),
    mutant(WindowOfCheckpoints, "", save_steps=4),
    mutant(CapBelowAStep, "", cap=3),
    mutant(FateKeepsState, "", filtered=frozenset({1})),
    mutant(CloseEach, "second,lost,spoil", seed=3, per_step=3),
    mutant(EarlyFlush, "", per_step=3, seed=24),
    mutant(FatesFirst, "crash", staleness=0, seed=37),
    mutant(BlameAll, "", poison=frozenset({("generator", 2)})),
    mutant(NoMinVersion, "", staleness=0),
    mutant(NoRunId, "roll back", seed=1),
    mutant(NoLineage, "second,crash", seed=20),
    mutant(IssueNext, "lost,second", seed=2),
    mutant(PruneAll, "", filtered=frozenset({1, 2, 6, 7}), save_steps=1),
    mutant(AckEarly, "crash", save_steps=3, rate=0.02, seed=1),
    mutant(LateHolders, "second,crash", seed=4),
]
