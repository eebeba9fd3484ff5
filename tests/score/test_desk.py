"""What becomes of groups that a teacher outside cannot or will not score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from streamopd import config as configs
from streamopd.assets import resolve
from streamopd.errors import GarbageRecord, TeacherAway, TeacherError
from streamopd.schemas import Group, Scored, decode, encode
from streamopd.score import local
from streamopd.score.budget import Budget
from streamopd.score.item import Views
from streamopd.score.panel import Panel
from streamopd.services import teacher as service
from streamopd.services.teacher import UNUSABLE, Desk, open_teachers
from streamopd.slots import EvidenceRequest
from streamopd.stream import HandOff
from streamopd.stream.memory import MemoryBroker, MemoryStore
from streamopd.topology import Stage
from streamopd.worker import Lease, Run, Worker
from tests.score.conftest import GroupMaker
from tests.score.test_local import plain_logp

pytestmark = pytest.mark.anyio
COUNT = 12


class Scripted:
    """A teacher that scores nothing but says no: to every group, or to those whose seq is in `bad`."""

    vocab_size = 300

    def __init__(self, error: type[Exception], bad: Sequence[int]) -> None:
        self.error, self.bad, self.calls = error, set(bad), []

    def score(self, groups: Sequence[Group], request: EvidenceRequest, beside: Sequence[Views] | None = None) -> list[Views]:
        self.calls.append(len(groups))
        if any(group.prompt.seq in self.bad for group in groups):
            raise self.error("no")
        return [[[] for _ in group.rollouts] for group in groups]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config, _ = configs.load("quickstart")
    return Run.create(tmp_path, config)


def run_of(folder: Path, method: str, *overrides: str) -> Run:
    """A run of a method that is written down here; its slots are all in reach."""
    file = folder / "mine.py"
    file.write_text(f'from streamopd.slots import *\nMINE = Method(name="mine", summary="", {method})\n')
    config, _ = configs.load("quickstart", [f"method={file}:MINE", *overrides])
    return Run.create(folder / "run", config)


async def desk_with(run: Run, worker: Worker, teacher: Scripted, make_group: GroupMaker) -> tuple[Desk, list]:  # type: ignore[type-arg]
    """A desk with COUNT groups in hand."""
    panel = Panel.of(run.method, run.config.teachers)
    leases = await take(run, worker, [make_group(seq) for seq in range(COUNT)])
    return Desk(run, worker, panel, {"default": teacher}, {}), leases  # type: ignore[dict-item]


async def take(run: Run, worker: Worker, groups: list[Group]) -> list[Lease[Group]]:
    """Leases on `groups`, which must have seqs from 0 on."""
    broker = worker.broker
    await broker.rebuild("b", 1, 0, {}, None)
    await worker.look()
    made = [
        Group(id=g.id, run=run.id, method=run.method.digest, born_s=0.0, prompt=g.prompt, rollouts=g.rollouts) for g in groups
    ]
    await broker.issue("b", [(g.prompt.seq, encode(g.prompt)) for g in made])
    entries = await broker.read(Stage.ISSUED, "test", len(groups))
    await broker.hand([HandOff(entry, encode(g)) for entry, g in zip(entries, made, strict=True)])
    return await worker.take(Stage.GENERATED, len(groups))


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


async def scored_by_a_panel(run: Run, groups: list[Group]) -> tuple[list[Scored], Worker, MemoryStore]:
    """What the service hands on of `groups`, asked as its panel is opened, all at once."""
    store = MemoryStore()
    await lead(run, store)
    async with worker_of(run, store) as worker:
        leases = await take(run, worker, groups)
        panel = Panel.of(run.method, run.config.teachers)
        desk = Desk(run, worker, panel, await open_teachers(run, worker, panel, {}), {})
        assert await desk.score("default", leases)
        assert not await worker.broker.quarantined()
        entries = await worker.broker.read(Stage.SCORED, "packer", len(groups))
        return [decode(Scored, entry.body, 1 << 26) for entry in entries], worker, store


EXOPD = "branches=(Branch(target=Extrapolate()),)"
OTHER = 'teachers.other={model="asset:quickstart-student"}'


async def test_the_students_own_start_stands_beside_the_teacher_and_says_what_its_model_says(
    tmp_path: Path, make_group: GroupMaker
) -> None:
    run = run_of(tmp_path, EXOPD)
    made = [make_group(seq, (6, 0, 3), vocab=19, student_k=16) for seq in range(3)]
    scored, worker, _ = await scored_by_a_panel(run, made)
    for item in scored:
        assert [[(v.role, v.teacher_id) for v in views] for views in item.views] == [
            [("teacher", "default"), ("reference", "reference")], [], [("teacher", "default"), ("reference", "reference")],
        ]
        for rollout, (view, own) in ((item.group.rollouts[r], item.views[r]) for r in (0, 2)):
            assert own.support.ids.numpy().tolist() == view.support.ids.numpy().tolist()
            logp_GV = plain_logp(resolve("asset:quickstart-student"), item.group, rollout)
            rows = np.arange(len(own.logprobs))
            np.testing.assert_allclose(own.logprobs.numpy(), logp_GV[rows, rollout.completion_ids.numpy()], atol=1e-4)
    assert {name: value for name, value in worker.counters.items() if name.startswith("teacher_tokens/")} == {
        "teacher_tokens/default": 27.0, "teacher_tokens/reference": 27.0,
    }


async def test_a_configured_reference_takes_the_place_of_the_students_start(tmp_path: Path, make_group: GroupMaker) -> None:
    run = run_of(tmp_path, EXOPD, 'teachers.base={model="asset:quickstart-teacher",role="reference"}')
    (item,), _, _ = await scored_by_a_panel(run, [make_group(0, (6,), vocab=19, student_k=16)])
    view, own = item.views[0]
    assert (own.role, own.teacher_id) == ("reference", "base")
    np.testing.assert_allclose(own.logprobs.numpy(), view.logprobs.numpy(), atol=1e-6)  # here it is the same model


async def test_every_teacher_of_a_pool_scores_every_answer(tmp_path: Path, make_group: GroupMaker) -> None:
    run = run_of(tmp_path, 'teachers=Pool(weights=(("other", 1.0), ("default", 3.0)))', OTHER)
    made = [make_group(seq, (5, 2), vocab=19, student_k=16) for seq in range(2)]
    scored, worker, _ = await scored_by_a_panel(run, made)
    models = {"default": "asset:quickstart-teacher", "other": "asset:quickstart-student"}
    for item in scored:
        for rollout, views in zip(item.group.rollouts, item.views, strict=True):
            assert [view.teacher_id for view in views] == ["default", "other"]
            for view in views:
                logp_GV = plain_logp(resolve(models[view.teacher_id]), item.group, rollout)
                rows = np.arange(len(view.logprobs))
                np.testing.assert_allclose(view.logprobs.numpy(), logp_GV[rows, rollout.completion_ids.numpy()], atol=1e-4)
    assert worker.counters["teacher_tokens/default"] == worker.counters["teacher_tokens/other"] == 14.0


async def test_a_method_that_listens_to_nobody_hands_groups_on_and_loads_no_model(
    tmp_path: Path, make_group: GroupMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, 'branches=(Branch(loss=Advantage(), form="policy_gradient"),)')
    monkeypatch.setattr(local, "load_teachers", None)
    scored, worker, _ = await scored_by_a_panel(run, [make_group(seq, (5, 2)) for seq in range(2)])
    assert [item.views for item in scored] == [[[], []], [[], []]]
    assert not [name for name in worker.counters if name.startswith("teacher_tokens/")]


async def test_a_group_that_names_a_reference_as_its_teacher_is_refused(tmp_path: Path, make_group: GroupMaker) -> None:
    run, store = run_of(tmp_path, "", 'teachers.base={model="asset:quickstart-teacher",role="reference"}'), MemoryStore()
    await lead(run, store)
    async with worker_of(run, store) as worker:
        desk, leases = await desk_with(run, worker, Scripted(GarbageRecord, []), make_group)
        assert await desk.score("base", leases[:1])
        ((seq, reason),) = {(line["seq"], line["reason"]) for line in await worker.broker.quarantined()}
        assert seq == "0"
        assert 'teachers.base is of role "reference" and teaches nobody' in reason


async def test_a_slice_beyond_the_students_vocabulary_ends_the_run_at_its_start(tmp_path: Path) -> None:
    run, store = run_of(tmp_path, "branches=(Branch(support=VocabularySlice(ids=(3, 19))),)"), MemoryStore()
    await lead(run, store)
    async with worker_of(run, store) as worker:
        with pytest.raises(TeacherError, match="VocabularySlice names id 19, and the student has 19 ids"):
            await open_teachers(run, worker, Panel.of(run.method, run.config.teachers), {})


async def test_who_is_not_asked_is_said_at_the_start(tmp_path: Path) -> None:
    run, store = run_of(tmp_path, "branches=(Branch(loss=Likelihood()),)"), MemoryStore()
    await lead(run, store)
    async with worker_of(run, store) as worker:
        worker.closed = True  # the run is over before the first group
        await service.main(run, worker)
        told = [event.text for _, event in store.events if event.kind == "not_asked"]
    assert told == ['method = "mine" asks no teacher: default of the run file scores nothing.']


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
