"""The learner's side of the protocol, killed before and after each call it makes: nothing is lost, nothing counts twice."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from streamopd.errors import ConfigError, Fenced
from streamopd.learn.checkpoint import load_newest
from streamopd.learn.lineage import Lineage
from streamopd.schemas import Fate, Weights
from streamopd.stream import HandOff, Limits
from streamopd.stream.memory import MemoryBroker, MemoryStore
from streamopd.topology import Stage

pytestmark = pytest.mark.anyio
B, S, STEPS, SAVE_EVERY = 2, 1, 5, 2
LIMITS = Limits(groups_per_step=B, max_staleness=S)


class Killed(BaseException):
    """A SIGKILL, as a test can have it."""


class CountingTrainer:
    """An oracle in the weights: training seq s adds one to its count, so loss and doubling show in the weights themselves."""

    nbytes = 0

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def train(self, seqs: list[int]) -> None:
        for seq in seqs:
            self.counts[str(seq)] = self.counts.get(str(seq), 0) + 1

    def save(self, folder: Path) -> None:
        (folder / "counts.json").write_text(json.dumps(self.counts))

    def load(self, folder: Path) -> None:
        self.counts = json.loads((folder / "counts.json").read_text())


class Mortal:
    """A broker client that is killed at its k-th call: before the server ran it, or after, with the answer lost."""

    def __init__(self, broker: MemoryBroker, at: int, after: bool) -> None:
        self.broker, self.at, self.after, self.calls = broker, at, after, 0

    def __getattr__(self, name: str) -> Any:
        target: Callable[..., Awaitable[Any]] = getattr(self.broker, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at and not self.after:
                raise Killed
            answer = await target(*args, **kwargs)
            if self.calls == self.at:
                raise Killed
            return answer

        return call


class Shaken(Mortal):
    """A client whose broker is restarted at its k-th call, with nothing lost: the answer of that call is."""

    def __init__(self, broker: MemoryBroker, at: int, after: bool, store: MemoryStore) -> None:
        super().__init__(broker, at, after)
        self.store = store

    def __getattr__(self, name: str) -> Any:
        call = super().__getattr__(name)

        async def again(*args: Any, **kwargs: Any) -> Any:
            try:
                return await call(*args, **kwargs)
            except Killed:
                self.store.restart()
                return await call(*args, **kwargs)

        return again


class World:
    """One run: a broker, a disk, and everybody but the learner, who never fails."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, MemoryStore()
        self.others = MemoryBroker(LIMITS, self.store)
        self.published: dict[tuple[str, int], str] = {}

    async def publish(self, boot: str, n: int) -> Weights:
        self.published[boot, n] = json.dumps(self.trainer.counts, sort_keys=True)
        return Weights(run="r", boot=boot, n=n, folder=f"weight_v{n:06d}")

    async def pump(self) -> None:
        """Feeder, generator, teacher and packer, each to where it can go."""
        counters = await self.others.counters()
        seqs = list(counters.again) or list(range(counters.issued, counters.issued + B * (S + 1)))
        await self.others.issue(counters.boot, [(seq, b"prompt") for seq in seqs])
        for stage in (Stage.ISSUED, Stage.GENERATED):
            entries = await self.others.read(stage, "worker", 100)
            await self.others.hand([HandOff(entry, b"record") for entry in entries])
        entries = await self.others.sweep(Stage.SCORED, "packer", set(), B)
        if len(entries) == B:
            await self.others.close(entries, (await self.others.counters()).batchno, b"batch")

    async def live(self, broker: Any, last: int = STEPS, dataset: str = "data", save_every: int = SAVE_EVERY) -> Lineage:
        """One life of a learner."""
        self.trainer = CountingTrainer()
        lineage = Lineage(broker, self.trainer, self.folder, self.publish, dataset, "config", restamp=True)  # type: ignore[arg-type]
        await lineage.start()
        while lineage.n < last or lineage.n < (await broker.counters()).steps:
            await self.pump()
            entry = await lineage.next_batch("learner", 0.0)
            if entry is None:
                continue
            assert entry.n == lineage.n
            self.trainer.train([seq for seq, _ in entry.members])
            await lineage.take_step(entry, [Fate.TRAINED] * len(entry.members))
            await self.weights_and_fates_came_together(lineage)
            if lineage.n - lineage.base[1] >= save_every:
                await lineage.checkpoint()
        await lineage.finish()
        return lineage

    async def weights_and_fates_came_together(self, lineage: Lineage) -> None:
        """Whoever sees step n sees weights n, and they hold what the fates say."""
        counters = await self.others.counters()
        assert counters.weights_n == counters.steps
        assert (lineage.boot, counters.steps) in self.published

    def the_account_is_exact(self) -> None:
        found = load_newest(self.folder)
        assert found is not None
        checkpoint = found.checkpoint
        trained = {seq for seq, fate in checkpoint.record.items() if fate == "trained"}
        counts = json.loads((found.folder / "counts.json").read_text())
        assert checkpoint.done
        assert {int(seq) for seq in counts} == trained
        assert set(counts.values()) <= {1}, counts
        assert checkpoint.fed == len(checkpoint.record) + len(checkpoint.unused)
        assert not set(checkpoint.unused) & set(checkpoint.record), "a group is both fated and unused"


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
async def test_a_learner_killed_at_any_call_trains_each_group_once(tmp_path: Path, after: bool) -> None:
    lives, at = 0, 1
    while True:
        world = World(tmp_path / f"{at}")
        mortal = Mortal(MemoryBroker(LIMITS, world.store), at, after)
        try:
            await world.live(mortal)
        except Killed:
            lives += 1
            await world.live(MemoryBroker(LIMITS, world.store))
        world.the_account_is_exact()
        if mortal.calls < at:
            break
        at += 1
    assert lives > 20


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
async def test_a_learner_killed_at_any_call_replays_what_it_can(tmp_path: Path, after: bool) -> None:
    """A kill costs a replay, never a rebuild: the broker lost nothing, so its life goes on."""
    for at in range(8, 40):
        world = World(tmp_path / f"{at}")
        try:
            await world.live(Mortal(MemoryBroker(LIMITS, world.store), at, after))
        except Killed:
            boot = (await world.others.counters()).boot
            reborn = await world.live(MemoryBroker(LIMITS, world.store))
            assert reborn.boot == boot, f"killed at call {at}, the broker was rebuilt"


async def test_kills_that_are_no_batchs_fault_convict_none(tmp_path: Path) -> None:
    """Five learners die one after another inside one checkpoint interval; each replay clears what it counted."""
    world = World(tmp_path)
    for at in (24, 12, 15, 18, 21):
        with pytest.raises(Killed):
            await world.live(Mortal(MemoryBroker(LIMITS, world.store), at, after=True), last=40, save_every=100)
    last = await world.live(MemoryBroker(LIMITS, world.store), last=8, save_every=100)
    assert "dead:killed the learner" not in last.record.values()
    world.the_account_is_exact()


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
async def test_a_broker_restarted_at_any_call_costs_nothing(tmp_path: Path, after: bool) -> None:
    for at in range(1, 45):
        world = World(tmp_path / f"{at}")
        await world.live(Shaken(MemoryBroker(LIMITS, world.store), at, after, world.store))
        world.the_account_is_exact()


async def test_a_replayed_batch_is_trained_at_the_same_n_and_gives_the_same_weights(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(Killed):
        await world.live(Mortal(MemoryBroker(LIMITS, world.store), 20, after=True))
    before = dict(world.published)
    await world.live(MemoryBroker(LIMITS, world.store))
    again = {key: value for key, value in world.published.items() if key in before}
    assert again == before


async def test_a_wiped_broker_is_rebuilt_and_nothing_is_doubled(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(Killed):
        await world.live(Mortal(MemoryBroker(LIMITS, world.store), 18, after=True))
    world.store = MemoryStore()
    world.others = MemoryBroker(LIMITS, world.store)
    await world.live(MemoryBroker(LIMITS, world.store))
    world.the_account_is_exact()


async def test_an_older_learner_is_fenced(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.trainer = CountingTrainer()
    broker = MemoryBroker(LIMITS, world.store)
    old, new = (Lineage(broker, CountingTrainer(), tmp_path, world.publish, "data", "config", restamp=True) for _ in range(2))  # type: ignore[arg-type]
    await old.start()
    await new.start()
    with pytest.raises(Fenced):
        await old.checkpoint()


async def test_a_run_that_ended_goes_on_when_more_steps_are_asked_for(tmp_path: Path) -> None:
    world = World(tmp_path)
    first = await world.live(MemoryBroker(LIMITS, world.store))
    more = await world.live(MemoryBroker(LIMITS, world.store), last=STEPS + 3)
    assert (first.n, more.n) == (STEPS, STEPS + 3)
    world.the_account_is_exact()


async def test_changed_data_refuses_to_resume(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.live(MemoryBroker(LIMITS, world.store))
    with pytest.raises(ConfigError, match="dataset data, this run has other"):
        await world.live(MemoryBroker(LIMITS, world.store), last=STEPS + 1, dataset="other")
