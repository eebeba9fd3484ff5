"""What becomes of groups that a teacher outside cannot or will not score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from streamopd import config as configs
from streamopd.errors import GarbageRecord, TeacherAway, TeacherError
from streamopd.schemas import Group, encode
from streamopd.score.budget import Budget
from streamopd.services import teacher as service
from streamopd.services.teacher import UNUSABLE, Desk, Views
from streamopd.slots import EvidenceRequest
from streamopd.stream import HandOff
from streamopd.stream.memory import MemoryBroker, MemoryStore
from streamopd.topology import Stage
from streamopd.worker import Run, Worker
from tests.score.conftest import GroupMaker

pytestmark = pytest.mark.anyio
COUNT = 12


class Scripted:
    """A teacher that scores nothing but says no: to every group, or to those whose seq is in `bad`."""

    vocab_size = 300

    def __init__(self, error: type[Exception], bad: Sequence[int]) -> None:
        self.error, self.bad, self.calls = error, set(bad), []

    def score(self, groups: Sequence[Group], request: EvidenceRequest) -> list[Views]:
        self.calls.append(len(groups))
        if any(group.prompt.seq in self.bad for group in groups):
            raise self.error("no")
        return [[[] for _ in group.rollouts] for group in groups]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config, _ = configs.load("quickstart")
    return Run.create(tmp_path, config)


async def desk_with(run: Run, worker: Worker, teacher: Scripted, make_group: GroupMaker) -> tuple[Desk, list]:  # type: ignore[type-arg]
    """A desk with COUNT groups in hand."""
    broker = worker.broker
    await broker.rebuild("b", 1, 0, {}, None)
    await worker.look()
    groups = [make_group(seq) for seq in range(COUNT)]
    made = [
        Group(id=g.id, run=run.id, method=run.method.digest, born_s=0.0, prompt=g.prompt, rollouts=g.rollouts) for g in groups
    ]
    await broker.issue("b", [(g.prompt.seq, encode(g.prompt)) for g in made])
    entries = await broker.read(Stage.ISSUED, "test", COUNT)
    await broker.hand([HandOff(entry, encode(g)) for entry, g in zip(entries, made, strict=True)])
    return Desk(run, worker, {"default": teacher}, {}), await worker.take(Stage.GENERATED, COUNT)  # type: ignore[dict-item]


def worker_of(run: Run, store: MemoryStore) -> Worker:
    return Worker(run, "teacher", "teacher-0", MemoryBroker(run.limits, store), inline=True)


async def test_only_the_group_that_fails_alone_is_at_fault(run: Run, make_group: GroupMaker) -> None:
    store = MemoryStore()
    await lead(run, store)
    async with worker_of(run, store) as worker:
        teacher = Scripted(GarbageRecord, [5])
        desk, leases = await desk_with(run, worker, teacher, make_group)
        assert await desk.score("default", leases)
        assert {line["seq"] for line in await worker.broker.quarantined()} == {"5"}
        assert (await worker.broker.counters()).inflight["scored"] == COUNT - 1
        assert teacher.calls == [COUNT, *[1] * COUNT]


async def test_a_teacher_that_is_always_wrong_ends_the_run(run: Run, make_group: GroupMaker) -> None:
    store = MemoryStore()
    await lead(run, store)
    async with worker_of(run, store) as worker:
        desk, leases = await desk_with(run, worker, Scripted(GarbageRecord, range(COUNT)), make_group)
        with pytest.raises(TeacherError, match=f"gave {UNUSABLE} unusable answers in a row; the last: no"):
            await desk.score("default", leases)


async def test_a_teacher_that_is_away_costs_no_group_anything(
    run: Run, make_group: GroupMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "AWAY_S", 0.01)
    store = MemoryStore()
    await lead(run, store)
    async with worker_of(run, store) as worker:
        desk, leases = await desk_with(run, worker, Scripted(TeacherAway, range(COUNT)), make_group)
        assert not await desk.score("default", leases)
        assert not worker.held_ids
        assert (await worker.broker.counters()).inflight["generated"] == COUNT
        assert not await worker.broker.quarantined()
        assert [event.kind for _, event in store.events].count("away") == 1


async def test_replicas_that_ask_at_once_share_one_budget(run: Run) -> None:
    """Each reserves before it asks: four of them find room for two batches of 40 in 100 tokens."""
    broker = MemoryBroker(run.limits, MemoryStore())
    budgets = [Budget("default", 100, broker) for _ in range(4)]
    taken = [await reserves(budget, 40) for budget in budgets]
    assert taken == [True, True, False, False]
    await budgets[0].settle(40, 55)  # a retry
    assert await broker.spend("default", 0) == 95
    assert not await reserves(budgets[3], 6)
    await budgets[1].settle(40, 0)   # nothing went out
    assert await reserves(budgets[3], 45)


async def reserves(budget: Budget, tokens: int) -> bool:
    try:
        await budget.require(tokens)
    except TeacherError:
        return False
    return True


async def lead(run: Run, store: MemoryStore) -> None:
    await MemoryBroker(run.limits, store).lead("b", 1, False)
