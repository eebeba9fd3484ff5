"""Each script's law, on both brokers; and that repeating any call changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from streamopd.schemas import Event, Fate, Heartbeat, Weights
from streamopd.stream.broker import Broker, Entry, HandOff
from streamopd.topology import Stage

from .benches import Bench

pytestmark = pytest.mark.anyio
BOOT = "b1"


def manifest(n: int) -> Weights:
    return Weights(run="r", boot=BOOT, n=n, folder=f"weight_v{n:06d}")


async def born(bench: Bench, record: dict[int, str] | None = None, n: int = 0) -> Broker:
    """A broker after its first rebuild."""
    broker = await bench.client()
    assert await broker.rebuild(BOOT, 1, n, record or {}, manifest(n)) == "done"
    return broker


async def issued(bench: Bench, count: int = 4) -> Broker:
    broker = await born(bench)
    assert await broker.issue(BOOT, [(seq, b"p%d" % seq) for seq in range(count)]) == ["done"] * count
    return broker


async def held(broker: Broker, stage: Stage, count: int = 4, who: str = "a") -> list[Entry]:
    entries = await broker.read(stage, who, count)
    assert all(not entry.problem for entry in entries)
    return entries


async def moved(broker: Broker, to: Stage, count: int = 4) -> None:
    """Take what is issued on to `to`."""
    for stage in range(Stage.ISSUED, to):
        entries = await held(broker, Stage(stage), count)
        assert await broker.hand([HandOff(e, e.body) for e in entries]) == ["done"] * len(entries)


async def scored(bench: Bench, count: int = 4) -> tuple[Broker, list[Entry]]:
    broker = await issued(bench, count)
    await moved(broker, Stage.SCORED, count)
    return broker, await broker.sweep(Stage.SCORED, "packer", set(), count)


async def batched(bench: Bench) -> Broker:
    """Two batches of two groups."""
    broker, entries = await scored(bench)
    for n in (0, 1):
        assert await broker.close(entries[2 * n : 2 * n + 2], n, b"batch %d" % n) == ("done", [])
    return broker


def fates_of(n: int, fate: Fate = Fate.TRAINED) -> list[tuple[int, str, Fate]]:
    return [(seq, f"{BOOT}.1", fate) for seq in (2 * n, 2 * n + 1)]


async def changes_nothing(bench: Bench, again: Callable[[], Awaitable[Any]]) -> Any:
    before = await bench.view()
    answer = await again()
    assert await bench.view() == before
    return answer


# ---------------------------------------------------------------------------------------------------- feeder
async def test_a_broker_without_a_boot_refuses_every_call(bench: Bench) -> None:
    broker = await bench.client()
    assert await broker.boot() == ""
    assert (await broker.counters()).boot == ""
    assert await broker.issue(BOOT, [(0, b"p")]) == ["amnesia"]
    assert await broker.drain(BOOT, 0) == "amnesia"
    assert await broker.lead(BOOT, 1, True) == "amnesia"
    assert await broker.step(BOOT, 1, 1, None, []) == "amnesia"
    assert await broker.read(Stage.ISSUED, "a", 4) == []
    assert await broker.own_pending(Stage.ISSUED, "a") == []
    assert await broker.reap(Stage.ISSUED, "a", 0.0, 4) == []
    assert await broker.batch(0, "learner") is None
    assert await broker.committed() == (0, 0)


async def test_prompts_are_issued_densely_and_in_order_until_the_window_is_full(bench: Bench) -> None:
    broker = await born(bench)
    assert await broker.issue(BOOT, [(0, b"a"), (2, b"c"), (1, b"b")]) == ["done", "already", "done"]
    assert await broker.issue(BOOT, [(seq, b"x") for seq in (2, 3, 4, 5)]) == ["done", "done", "full"]
    entries = await held(broker, Stage.ISSUED, 9)
    assert [(e.seq, e.attempt, e.body) for e in entries] == [
        (0, "b1.1", b"a"), (1, "b1.1", b"b"), (2, "b1.1", b"x"), (3, "b1.1", b"x"),
    ]


async def test_a_repeated_issue_changes_nothing(bench: Bench) -> None:
    broker = await issued(bench, 2)
    assert await changes_nothing(bench, lambda: broker.issue(BOOT, [(0, b"other"), (1, b"other")])) == ["already"] * 2


async def test_prompts_of_another_boot_are_refused(bench: Bench) -> None:
    broker = await issued(bench, 1)
    assert await changes_nothing(bench, lambda: broker.issue("b0", [(1, b"x")])) == ["amnesia"]


async def test_a_full_byte_budget_closes_the_door_but_never_below_one_step(bench: Bench) -> None:
    broker = await born(bench)  # cap: 1000 bytes
    assert await broker.issue(BOOT, [(0, b"x" * 900), (1, b"x" * 900), (2, b"x")]) == ["done", "done", "full"]
    assert (await broker.counters()).bytes_inflight == 1800
    [first, second] = await held(broker, Stage.ISSUED)
    await broker.hand([HandOff(first, b"y" * 10), HandOff(second, b"y" * 10)])
    assert await broker.issue(BOOT, [(2, b"x")]) == ["done"]


async def test_a_prompt_names_the_weights_its_generator_must_serve(bench: Bench) -> None:
    broker = await batched(bench)
    await broker.step(BOOT, 1, 1, manifest(1), fates_of(0))
    await broker.step(BOOT, 1, 2, manifest(2), fates_of(1))
    await broker.issue(BOOT, [(4, b"p4")])
    assert [e.min_version for e in await held(broker, Stage.ISSUED)] == [1]


async def test_the_data_ends_only_when_all_of_it_was_issued(bench: Bench) -> None:
    broker = await issued(bench, 2)
    assert await broker.drain(BOOT, 3) == "wait"
    [entry, _] = await held(broker, Stage.ISSUED)
    await broker.reissue(entry, "unreadable")
    assert await broker.drain(BOOT, 2) == "wait"
    await broker.issue(BOOT, [(0, b"p0")])
    assert await broker.drain(BOOT, 2) == "done"
    assert await changes_nothing(bench, lambda: broker.drain(BOOT, 2)) == "done"
    assert await broker.issue(BOOT, [(2, b"p2")]) == ["already"]


# ------------------------------------------------------------------------------------- generators and teachers
async def test_an_entry_is_delivered_once_and_pends_under_its_reader(bench: Bench) -> None:
    broker = await issued(bench)
    mine = await held(broker, Stage.ISSUED, 3, "a")
    assert [e.seq for e in await held(broker, Stage.ISSUED, 3, "b")] == [3]
    assert await broker.own_pending(Stage.ISSUED, "a") == mine
    assert (await broker.counters()).pending["prompts"] == 4


async def test_a_blocked_reader_is_woken_by_an_issue(bench: Bench) -> None:
    broker = await born(bench)
    other = await bench.client()
    reading = asyncio.create_task(broker.read(Stage.ISSUED, "a", 4, block_s=5.0))
    await asyncio.sleep(0)
    await other.issue(BOOT, [(0, b"p")])
    assert [e.seq for e in await asyncio.wait_for(reading, 4.0)] == [0]


async def test_a_reader_that_finds_nothing_returns_after_its_time(bench: Bench) -> None:
    broker = await born(bench)
    assert await broker.read(Stage.ISSUED, "a", 4, block_s=0.05) == []
    assert await broker.sweep(Stage.SCORED, "packer", set(), 4, block_s=0.05) == []
    assert await broker.batch(0, "learner", block_s=0.05) is None


async def test_a_hand_off_moves_the_group_and_repeating_it_changes_nothing(bench: Bench) -> None:
    broker = await issued(bench, 1)
    [entry] = await held(broker, Stage.ISSUED)
    assert await broker.hand([HandOff(entry, b"rollout")]) == ["done"]
    assert await changes_nothing(bench, lambda: broker.hand([HandOff(entry, b"another")])) == ["already"]
    [handed] = await held(broker, Stage.GENERATED)
    assert (handed.seq, handed.attempt, handed.body) == (0, "b1.1", b"rollout")
    assert (await bench.view()).state == {0: ("b1.1", Stage.GENERATED)}


async def test_a_zombie_may_land_first_but_only_one_hand_off_lands(bench: Bench) -> None:
    broker = await issued(bench, 1)
    [first] = await held(broker, Stage.ISSUED, who="zombie")
    await bench.abandon(Stage.ISSUED, "zombie")
    [second] = await broker.reap(Stage.ISSUED, "b", 60.0, 4)
    assert second.id == first.id
    assert await broker.hand([HandOff(first, b"of the zombie")]) == ["done"]
    assert await broker.hand([HandOff(second, b"of the other")]) == ["already"]
    assert [e.body for e in await held(broker, Stage.GENERATED)] == [b"of the zombie"]


async def test_items_of_another_boot_are_told_apart_within_one_call(bench: Bench) -> None:
    broker = await issued(bench, 2)
    [old, _] = await held(broker, Stage.ISSUED)
    await broker.rebuild("b2", 1, 0, {}, None)
    await broker.issue("b2", [(0, b"p0")])
    [new] = await held(broker, Stage.ISSUED)
    assert await broker.hand([HandOff(old, b"x"), HandOff(new, b"y")]) == ["amnesia", "done"]


async def test_what_is_released_is_read_by_another_without_a_kill(bench: Bench) -> None:
    broker = await issued(bench, 1)
    [entry] = await held(broker, Stage.ISSUED, who="a")
    await broker.release([entry])
    await changes_nothing(bench, lambda: broker.release([entry]))
    [again] = await held(broker, Stage.ISSUED, who="b")
    assert (again.seq, again.attempt, again.body) == (entry.seq, entry.attempt, entry.body)
    assert (await bench.view()).kills == {}


async def test_the_copy_that_a_late_release_leaves_is_dropped_with_its_reason(bench: Bench) -> None:
    broker = await issued(bench, 1)
    [entry] = await held(broker, Stage.ISSUED)
    await broker.release([entry])
    assert await broker.hand([HandOff(entry, b"done after all")]) == ["done"]
    assert await broker.read(Stage.ISSUED, "b", 4) == []
    assert (await bench.view()).entries[0][0] == Stage.GENERATED
    assert ["a copy" in item["reason"] for item in await broker.quarantined()] == [True]


async def test_entries_whose_holder_makes_progress_are_not_reaped(bench: Bench) -> None:
    broker = await issued(bench, 2)
    [kept, left] = await held(broker, Stage.ISSUED, who="a")
    await bench.abandon(Stage.ISSUED, "a")
    await broker.renew(Stage.ISSUED, "a", [kept.id])
    await broker.renew(Stage.ISSUED, "stranger", [left.id])
    assert [e.id for e in await broker.reap(Stage.ISSUED, "b", 60.0, 4)] == [left.id]
    assert await broker.reap(Stage.ISSUED, "b", 60.0, 4) == []


async def test_a_reaper_takes_nothing_from_itself_and_finds_what_lies_behind(bench: Bench) -> None:
    broker = await issued(bench, 4)
    await held(broker, Stage.ISSUED, 3, "a")
    [last] = await held(broker, Stage.ISSUED, 1, "b")
    await bench.abandon(Stage.ISSUED, "a")
    await bench.abandon(Stage.ISSUED, "b")
    assert [e.id for e in await broker.reap(Stage.ISSUED, "a", 60.0, 1)] == [last.id]


async def test_the_second_kill_serves_an_item_alone_and_the_third_convicts_it(bench: Bench) -> None:
    broker = await issued(bench, 3)
    await held(broker, Stage.ISSUED, 1, "a")
    await bench.abandon(Stage.ISSUED, "a")
    [once] = await broker.reap(Stage.ISSUED, "b", 60.0, 4)
    assert not once.alone
    await bench.abandon(Stage.ISSUED, "b")
    assert await broker.reap(Stage.ISSUED, "c", 60.0, 4, empty=False) == []  # put back: c holds something
    assert [(e.seq, e.alone) for e in await broker.read(Stage.ISSUED, "d", 2)] == [(1, False), (2, False)]
    assert [(e.seq, e.alone) for e in await broker.read(Stage.ISSUED, "e", 4)] == [(0, True)]
    await bench.abandon(Stage.ISSUED, "e")
    assert await broker.reap(Stage.ISSUED, "f", 60.0, 4) == []
    view = await bench.view()
    assert view.fates == {0: "dead:killed its consumer"}
    assert (view.issued, view.fated, sorted(view.state)) == (3, 1, [1, 2])
    assert [(q["seq"], q["head"]) for q in await broker.quarantined()] == [("0", "p0")]


async def test_a_hand_off_forgets_the_kills(bench: Bench) -> None:
    broker = await issued(bench, 1)
    await held(broker, Stage.ISSUED, who="a")
    await bench.abandon(Stage.ISSUED, "a")
    [entry] = await broker.reap(Stage.ISSUED, "b", 60.0, 4)
    await broker.hand([HandOff(entry, b"x")])
    assert (await bench.view()).kills == {}


async def test_a_fate_ends_a_group_and_nothing_revives_it(bench: Bench) -> None:
    broker = await issued(bench, 1)
    [entry] = await held(broker, Stage.ISSUED)
    assert await broker.fate(entry, Fate.FILTERED, "too long") == "done"
    assert await changes_nothing(bench, lambda: broker.fate(entry, Fate.DEAD, "late")) == "already"
    assert await changes_nothing(bench, lambda: broker.hand([HandOff(entry, b"late")])) == ["already"]
    assert await changes_nothing(bench, lambda: broker.reissue(entry, "late")) == "already"
    assert await broker.fates() == {0: "filtered:too long"}
    counters = await broker.counters()
    assert (counters.issued, counters.fated, counters.bytes_inflight) == (1, 1, 0)


async def test_an_unreadable_payload_is_issued_again_under_the_next_attempt(bench: Bench) -> None:
    broker = await issued(bench, 1)
    await moved(broker, Stage.GENERATED, 1)
    [entry] = await held(broker, Stage.GENERATED)
    assert await broker.reissue(entry, "its blob is missing") == "done"
    assert await changes_nothing(bench, lambda: broker.reissue(entry, "again")) == "already"
    assert (await broker.counters()).again == (0,)
    assert await broker.issue(BOOT, [(0, b"p0 again")]) == ["done"]
    assert await changes_nothing(bench, lambda: broker.issue(BOOT, [(0, b"p0 again")])) == ["already"]
    assert await changes_nothing(bench, lambda: broker.hand([HandOff(entry, b"late")])) == ["already"]
    [again] = await held(broker, Stage.ISSUED)
    assert (again.attempt, again.body) == ("b1.2", b"p0 again")


async def test_a_payload_that_can_never_be_read_dies_after_three_attempts(bench: Bench) -> None:
    broker = await issued(bench, 1)
    for _ in range(3):
        [entry] = await held(broker, Stage.ISSUED)
        await broker.reissue(entry, "digest")
        await broker.issue(BOOT, [(0, b"p0")])
    assert await broker.fates() == {0: "dead:digest"}
    assert (await bench.view()).state == {}


# ---------------------------------------------------------------------------------------------------- packer
async def test_a_sweep_takes_what_pends_under_any_name(bench: Bench) -> None:
    broker, entries = await scored(bench)
    assert [e.seq for e in entries] == [0, 1, 2, 3]
    other = await bench.client()
    assert await other.sweep(Stage.SCORED, "second packer", {e.id for e in entries[:3]}, 4) == entries[3:]
    assert await broker.sweep(Stage.SCORED, "packer", {e.id for e in entries}, 4) == []
    assert await broker.sweep(Stage.SCORED, "packer", set(), 2) == entries[:2]


async def test_a_batch_is_closed_whole_and_repeating_it_changes_nothing(bench: Bench) -> None:
    broker, entries = await scored(bench)
    assert await broker.close(entries[:2], 0, b"batch 0") == ("done", [])
    assert await changes_nothing(bench, lambda: broker.close(entries[:2], 0, b"batch 0")) == ("already", [])
    batch = await broker.batch(0, "learner")
    assert batch is not None
    assert (batch.n, batch.members, batch.body, batch.boot) == (0, ((0, "b1.1"), (1, "b1.1")), b"batch 0", BOOT)


async def test_one_stale_member_and_no_batch_is_written(bench: Bench) -> None:
    broker, entries = await scored(bench)
    await broker.fate(entries[0], Fate.FILTERED)
    assert await broker.close(entries[:2], 0, b"batch") == ("stale", [entries[0].id])
    assert (await bench.view()).batches == {}
    assert await broker.close(entries[1:3], 0, b"batch") == ("done", [])


async def test_a_group_named_twice_is_not_batched_twice(bench: Bench) -> None:
    broker, entries = await scored(bench)
    twin = Entry("9-9", Stage.SCORED, entries[0].seq, entries[0].attempt, 0, b"")
    assert await broker.close([entries[0], twin], 0, b"batch") == ("stale", ["9-9"])


async def test_a_short_batch_is_closed_only_as_the_last_one(bench: Bench) -> None:
    broker, entries = await scored(bench, 3)
    assert await broker.close(entries[:1], 0, b"batch") == ("wait", [])
    await broker.drain(BOOT, 3)
    assert await broker.close(entries[:1], 0, b"batch") == ("wait", [])
    assert await broker.close(entries[:2], 0, b"batch") == ("done", [])
    assert await broker.close(entries[2:], 1, b"batch") == ("done", [])


async def test_a_batch_of_another_number_waits(bench: Bench) -> None:
    broker, entries = await scored(bench)
    assert await changes_nothing(bench, lambda: broker.close(entries[:2], 1, b"batch")) == ("wait", [])


# --------------------------------------------------------------------------------------------------- learner
async def test_a_step_publishes_weights_and_fates_together_and_once(bench: Bench) -> None:
    broker = await batched(bench)
    assert await broker.start_batch(BOOT, 1, 0) == 1
    assert await broker.start_batch(BOOT, 1, 0) == 2
    assert await broker.step(BOOT, 1, 1, manifest(1), [*fates_of(0)[:1], (1, "b1.1", Fate.EXPIRED)]) == "done"
    assert await changes_nothing(bench, lambda: broker.step(BOOT, 1, 1, manifest(1), fates_of(0))) == "already"
    assert await broker.weights() == manifest(1)
    assert await broker.fates() == {0: "trained", 1: "expired"}
    assert (await bench.view()).kills == {}
    counters = await broker.counters()
    assert (counters.steps, counters.fated, counters.weights_n) == (1, 2, 1)


async def test_a_step_without_weights_keeps_the_old_manifest(bench: Bench) -> None:
    broker = await batched(bench)
    assert await broker.step(BOOT, 1, 1, None, fates_of(0)) == "done"
    assert await broker.weights() == manifest(0)


async def test_a_commit_frees_batches_below_it_and_exactly_the_fates_it_names(bench: Bench) -> None:
    broker = await batched(bench)
    await broker.step(BOOT, 1, 1, manifest(1), fates_of(0))
    assert await broker.retained_bytes() == len(b"batch 0")
    assert await broker.commit(BOOT, 1, (1, 1), [0]) == "done"
    assert await changes_nothing(bench, lambda: broker.commit(BOOT, 1, (1, 1), [0])) == "done"
    assert await broker.fates() == {1: "trained"}
    assert await broker.committed() == (1, 1)
    assert await broker.retained_bytes() == 0
    assert await broker.batch(0, "learner") is None
    assert await broker.batch(1, "learner") is not None
    await broker.commit(BOOT, 1, (0, 9), [])
    assert await broker.committed() == (1, 1)


async def test_an_older_learner_is_fenced_from_every_call(bench: Bench) -> None:
    broker = await batched(bench)
    assert await broker.lead(BOOT, 2, False) == "done"
    assert await changes_nothing(bench, lambda: broker.lead(BOOT, 1, False)) == "fenced"
    assert await changes_nothing(bench, lambda: broker.step(BOOT, 1, 1, None, fates_of(0))) == "fenced"
    assert await changes_nothing(bench, lambda: broker.commit(BOOT, 1, (1, 2), [0])) == "fenced"
    assert await changes_nothing(bench, lambda: broker.finish(BOOT, 1)) == "fenced"
    assert await changes_nothing(bench, lambda: broker.rebuild("b2", 1, 0, {}, None)) == "fenced"
    assert await changes_nothing(bench, lambda: broker.start_batch(BOOT, 1, 0)) == 0


async def test_a_rebuild_issues_again_what_the_record_lacks(bench: Bench) -> None:
    broker = await batched(bench)
    assert await broker.rebuild("b2", 1, 3, {0: "trained", 1: "filtered:x", 4: "trained"}, manifest(3)) == "done"
    assert await changes_nothing(bench, lambda: broker.rebuild("b2", 1, 3, {}, None)) == "done"
    counters = await broker.counters()
    assert (counters.boot, counters.issued, counters.fated, counters.steps, counters.batchno) == ("b2", 5, 3, 3, 3)
    assert counters.again == (2, 3)
    assert counters.depths == dict.fromkeys(("prompts", "rollouts", "scored", "batches"), 0)
    assert await broker.committed() == (1, 3)
    assert await broker.issue("b2", [(2, b"p2"), (3, b"p3")]) == ["done", "done"]
    assert {(e.seq, e.attempt) for e in await held(broker, Stage.ISSUED)} == {(2, "b2.1"), (3, "b2.1")}


async def test_finish_shuts_the_door_and_its_account_is_whole(bench: Bench) -> None:
    broker = await batched(bench)
    await broker.step(BOOT, 1, 1, manifest(1), fates_of(0))
    account = await broker.finish(BOOT, 1)
    assert not isinstance(account, str)
    assert (account.fates, account.unused, account.issued) == ({0: "trained", 1: "trained"}, (2, 3), 4)
    assert await changes_nothing(bench, lambda: broker.finish(BOOT, 1)) == account
    assert await broker.issue(BOOT, [(4, b"p4")]) == ["closed"]
    assert await broker.drain(BOOT, 4) == "closed"
    assert await broker.read(Stage.ISSUED, "a", 4) == []
    assert (await broker.counters()).end == "closed"


# ------------------------------------------------------------------------------------------ lives of a broker
async def test_after_a_restart_all_wait_for_the_stamp_and_go_on(bench: Bench) -> None:
    broker = await issued(bench, 2)
    entries = await held(broker, Stage.ISSUED)
    await bench.restart()
    assert await broker.boot() == ""
    counters = await broker.counters()
    assert (counters.boot, counters.stamped) == (BOOT, False)
    assert await changes_nothing(bench, lambda: broker.hand([HandOff(e, b"x") for e in entries])) == ["amnesia"] * 2
    assert await broker.own_pending(Stage.ISSUED, "a") == entries
    assert await broker.lead(BOOT, 1, restamp=False) == "amnesia"
    assert await broker.lead(BOOT, 1, restamp=True) == "done"
    assert await broker.boot() == BOOT
    assert await broker.hand([HandOff(e, b"x") for e in entries]) == ["done"] * 2


async def test_a_lost_tail_is_seen_although_the_boot_is_there(bench: Bench) -> None:
    broker = await issued(bench, 1)
    snapshot = await bench.snapshot()
    await broker.issue(BOOT, [(1, b"p1")])
    await bench.roll_back(snapshot)
    assert await broker.boot() == ""
    assert await broker.issue(BOOT, [(1, b"p1")]) == ["amnesia"]
    assert await broker.read(Stage.ISSUED, "a", 4) == []


async def test_a_wiped_broker_is_nobodys(bench: Bench) -> None:
    broker = await issued(bench, 1)
    [entry] = await held(broker, Stage.ISSUED)
    await bench.wipe()
    assert await broker.hand([HandOff(entry, b"x")]) == ["amnesia"]
    await broker.renew(Stage.ISSUED, "a", [entry.id])
    await broker.release([entry])
    assert await broker.read(Stage.ISSUED, "a", 4, block_s=0.01) == []
    assert await broker.rebuild("b2", 1, 0, {}, None) == "done"


# --------------------------------------------------------------------------------------------- side channels
async def test_a_lease_has_one_owner(bench: Bench) -> None:
    broker = await bench.client()
    assert await broker.hold("packer", "a", 60.0)
    assert await broker.hold("packer", "a", 60.0)
    assert not await broker.hold("packer", "b", 60.0)
    await broker.drop_hold("packer", "b")
    assert not await broker.hold("packer", "b", 60.0)
    await broker.drop_hold("packer", "a")
    assert await broker.hold("packer", "b", 60.0)


async def test_heartbeats_and_events_come_back_as_they_were(bench: Bench) -> None:
    broker = await born(bench)
    beat = Heartbeat(service="teacher", instance="teacher-0", pid=1, born_s=1.0, progress=3, state="working")
    await broker.beat(beat)
    assert await broker.beats() == [beat]
    events = [Event(kind="swap", source="generator-0", born_s=float(i), text=f"v{i}") for i in range(3)]
    for event in events:
        await broker.emit(event)
    rows = await broker.events()
    assert [event for _, event in rows] == events
    assert [event for _, event in await broker.events(after=rows[0][0])] == events[1:]


async def test_news_of_another_client_is_heard(bench: Bench) -> None:
    broker, other = await born(bench), await bench.client()
    await broker.news(0.5)  # what came before counts as news
    await broker.news(0.05)
    hearing = asyncio.create_task(broker.news(10.0))
    await asyncio.sleep(0)
    await other.drain(BOOT, 0)
    await asyncio.wait_for(hearing, 4.0)


async def test_a_cancellation_that_comes_with_the_news_is_not_lost(bench: Bench) -> None:
    broker = await born(bench)
    await broker.news(0.5)
    await broker.news(0.05)
    hearing = asyncio.create_task(broker.news(10.0))
    await asyncio.sleep(0.05)
    broker._news.set()  # type: ignore[attr-defined]  # both in one turn of the loop
    hearing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.shield(hearing), 4.0)


async def test_two_clients_see_one_run(bench: Bench) -> None:
    broker, other = await issued(bench, 2), await bench.client()
    assert await other.boot() == BOOT
    assert len(await held(other, Stage.ISSUED)) == 2
    assert (await broker.counters()).inflight["issued"] == 2
