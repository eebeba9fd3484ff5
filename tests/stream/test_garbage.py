"""What cannot be trusted is quarantined with its reason, and the line goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamopd.errors import StreamError
from streamopd.schemas import Event
from streamopd.stream.broker import HandOff
from streamopd.stream.envelope import digest_of
from streamopd.stream.server import Server
from streamopd.topology import Stage

from .benches import Bench, ValkeyBench
from .conftest import LIMITS
from .test_laws import BOOT, held, issued, moved

pytestmark = pytest.mark.anyio


def record(seq: int = 0, attempt: str = "b1.1", body: bytes = b"of a stranger", **changes: Any) -> dict[str, Any]:
    fields = {"seq": seq, "attempt": attempt, "min_version": 0, "digest": digest_of(body), "size": len(body), "body": body}
    return fields | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"body": b"p!"}, "digest"),
        ({"body": b"p0 and more"}, "bytes"),
        ({"size": 3}, "bytes"),
        ({"body": b"x" * 5000, "size": 5000}, "cap of 4,096"),
        ({"size": 10**12}, "cap of 4,096"),
    ],
)
async def test_a_body_that_is_not_what_was_sent_is_a_problem_and_is_issued_again(
    bench: Bench, changes: dict[str, Any], reason: str
) -> None:
    broker = await issued(bench, 2)
    await bench.spoil(Stage.ISSUED, 0, **changes)
    entries = {e.seq: e for e in await broker.read(Stage.ISSUED, "a", 4)}
    assert reason in entries[0].problem
    assert (entries[0].body, entries[1].problem) == (b"", "")
    assert await broker.reissue(entries[0], entries[0].problem) == "done"
    assert await broker.issue(BOOT, [(0, b"p0")]) == ["done"]
    assert [(e.attempt, e.problem) for e in await broker.read(Stage.ISSUED, "a", 4)] == [("b1.2", "")]


@pytest.mark.parametrize(
    "fields",
    [
        record(seq=77),
        record(seq=77, body=b"x" * 100_000),
        record(attempt="b0.1"),
        record(seq=None),
        record(seq=-5),
        record(seq="zero"),
        record(attempt="no attempt at all"),
        record(digest=None),
        record(size="12 bytes"),
        record() | {"body": None},
        record(extra=1),
        {"hello": b"\xff\xfe"},
    ],
    ids=["unknown-seq", "huge", "other-boot", "no-seq", "negative-seq", "worded-seq", "bad-attempt", "no-digest",
         "worded-size", "no-body", "extra-field", "hello"],
)
@pytest.mark.parametrize("stage", [Stage.ISSUED, Stage.GENERATED, Stage.SCORED])
async def test_what_a_stranger_wrote_is_quarantined_and_the_line_goes_on(
    bench: Bench, fields: dict[str, Any], stage: Stage
) -> None:
    broker = await issued(bench, 2)
    await bench.inject(stage, **fields)
    await moved(broker, stage, 2)
    await bench.inject(stage, **fields)
    entries = await (broker.sweep(stage, "p", set(), 9) if stage == Stage.SCORED else broker.read(stage, "a", 9))
    assert [(e.seq, e.problem) for e in entries] == [(0, ""), (1, "")]
    quarantined = await broker.quarantined()
    assert len(quarantined) == 2
    assert all(row["reason"] and len(row["head"]) <= 1024 for row in quarantined)
    assert (await broker.counters()).depths[stage.stream] == 2


async def test_garbage_on_a_side_channel_is_passed_over(server: Server, memory_folder: Path) -> None:
    bench = ValkeyBench(LIMITS, server, memory_folder)
    broker = await bench.client()
    await bench.raw.xadd(bench.key("events"), {"event": b"\xff"})
    await bench.raw.xadd(bench.key("events"), {"no": "event"})
    await bench.raw.hset(bench.key("beats"), "stranger", b"\xff")
    event = Event(kind="join", source="teacher-0", born_s=1.0)
    await broker.emit(event)
    assert [found for _, found in await broker.events()] == [event]
    assert await broker.beats() == []
    await bench.raw.hset(bench.key("weights"), "manifest", b"{}")
    with pytest.raises(StreamError, match="manifest"):
        await broker.weights()
    await bench.close()


async def test_garbage_among_the_batches_stands_before_nothing(bench: Bench) -> None:
    broker = await issued(bench, 2)
    await bench.inject(Stage.BATCHED, n=0, members="[]", digest="0", size=1, body=b"x")
    await moved(broker, Stage.SCORED, 2)
    entries = await broker.sweep(Stage.SCORED, "packer", set(), 2)
    assert await broker.close(entries, 0, b"the true one") == ("done", [])
    batch = await broker.batch(0, "learner")
    assert batch is not None
    assert (batch.body, batch.problem) == (b"the true one", "")


async def test_a_group_whose_only_entry_was_damaged_is_issued_again(bench: Bench) -> None:
    broker = await issued(bench, 2)
    await bench.spoil(Stage.ISSUED, 0, attempt="damaged")
    assert [e.seq for e in await broker.read(Stage.ISSUED, "a", 4)] == [1]
    assert (await broker.counters()).again == (0,)
    assert await broker.issue(BOOT, [(0, b"p0")]) == ["done"]
    assert [(e.seq, e.attempt) for e in await held(broker, Stage.ISSUED)] == [(0, "b1.2")]


async def test_a_group_whose_held_entry_was_deleted_is_issued_again(bench: Bench) -> None:
    broker = await issued(bench, 2)
    await held(broker, Stage.ISSUED)
    await bench.abandon(Stage.ISSUED, "a")
    await bench.lose_entry(Stage.ISSUED, 0)
    reaped = await broker.reap(Stage.ISSUED, "b", 60.0, 4)
    assert [e.seq for e in reaped] == [1]
    assert (await broker.counters()).again == (0,)
    assert await broker.hand([HandOff(e, b"x") for e in reaped]) == ["done"]


async def test_a_renewal_notices_that_its_entry_was_deleted(bench: Bench) -> None:
    broker = await issued(bench, 2)
    entries = await held(broker, Stage.ISSUED)
    await bench.lose_entry(Stage.ISSUED, 0)
    await broker.renew(Stage.ISSUED, "a", [e.id for e in entries])
    assert (await broker.counters()).again == (0,)


async def test_a_scored_group_that_was_deleted_under_the_packer_is_issued_again(bench: Bench) -> None:
    broker = await issued(bench, 2)
    await moved(broker, Stage.SCORED, 2)
    await broker.sweep(Stage.SCORED, "packer", set(), 2)
    await bench.lose_entry(Stage.SCORED, 1)
    assert [e.seq for e in await broker.sweep(Stage.SCORED, "packer", set(), 2)] == [0]
    assert (await broker.counters()).again == (1,)
