"""Payloads beside the stream: trusted by size and digest, removed when nobody can need them."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from streamopd.errors import StreamError
from streamopd.schemas import Fate
from streamopd.stream.blobs import BlobFolder
from streamopd.stream.broker import Broker, Entry, HandOff
from streamopd.stream.server import Server
from streamopd.topology import Stage

from .benches import ValkeyBench
from .conftest import LIMITS
from .test_laws import BOOT, born

pytestmark = pytest.mark.anyio
LARGE = b"large " * 20  # above the 64 bytes that these tests let an entry carry


@pytest.fixture
async def valkey(server: Server, memory_folder: Path) -> AsyncIterator[ValkeyBench]:
    bench = ValkeyBench(LIMITS, server, memory_folder)
    yield bench
    await bench.close()


async def taken(bench: ValkeyBench) -> tuple[Broker, list[Entry]]:
    """Two large prompts, read."""
    broker = await born(bench)
    assert await broker.issue(BOOT, [(0, LARGE), (1, LARGE)]) == ["done", "done"]
    return broker, await broker.read(Stage.ISSUED, "a", 4)


async def test_a_large_payload_travels_by_file_and_a_small_one_in_its_entry(valkey: ValkeyBench) -> None:
    broker, entries = await taken(valkey)
    assert [(e.body, e.problem, bool(e.ref)) for e in entries] == [(LARGE, "", True)] * 2
    assert await broker.hand([HandOff(entries[0], b"small"), HandOff(entries[1], LARGE)]) == ["done", "done"]
    first, second = await broker.read(Stage.GENERATED, "t", 4)
    assert (first.body, first.ref) == (b"small", "")
    assert (second.body, [p.name for p in valkey.payloads]) == (LARGE, [second.ref])


async def test_a_payload_that_did_not_land_leaves_no_file(valkey: ValkeyBench) -> None:
    broker, entries = await taken(valkey)
    await broker.hand([HandOff(entries[0], LARGE)])
    kept = valkey.payloads
    assert await broker.hand([HandOff(entries[0], LARGE)]) == ["already"]
    assert await broker.issue(BOOT, [(0, LARGE)]) == ["already"]
    assert valkey.payloads == kept


async def test_a_missing_or_altered_payload_is_a_problem_of_its_entry(valkey: ValkeyBench) -> None:
    broker, entries = await taken(valkey)
    (valkey.blobs / entries[0].ref).unlink()
    (valkey.blobs / entries[1].ref).write_bytes(LARGE.upper())
    missing, altered = await broker.own_pending(Stage.ISSUED, "a")
    assert "cannot be opened" in missing.problem
    assert "digest" in altered.problem
    assert (missing.body, altered.body) == (b"", b"")
    assert await broker.reissue(missing, missing.problem) == "done"
    assert await broker.reissue(altered, altered.problem) == "done"
    assert valkey.payloads == []
    assert (await broker.counters()).again == (0, 1)


@pytest.mark.parametrize("ref", ["../../secret", "/etc/passwd", "b1.1-1-0-" + "0" * 32 + "-00000000", ""])
async def test_a_reference_never_leads_out_of_the_folder(valkey: ValkeyBench, ref: str) -> None:
    broker = await born(valkey)
    await broker.issue(BOOT, [(0, LARGE)])
    if ref.startswith("b1"):
        (valkey.blobs / ref).symlink_to("/etc/passwd")
    await valkey.spoil(Stage.ISSUED, 0, ref=ref)
    [entry] = await broker.read(Stage.ISSUED, "a", 4)
    assert entry.problem
    assert entry.body == b""


async def test_a_batch_keeps_its_payload_until_its_commit_is_done(valkey: ValkeyBench) -> None:
    broker, entries = await taken(valkey)
    for stage in (Stage.GENERATED, Stage.SCORED):
        await broker.hand([HandOff(e, e.body) for e in entries])
        entries = await (broker.read(stage, "t", 4) if stage < Stage.SCORED else broker.sweep(stage, "p", set(), 4))
    assert await broker.close(entries, 0, LARGE * 2) == ("done", [])
    assert await broker.close(entries, 0, LARGE * 2) == ("already", [])
    [payload] = valkey.payloads
    await broker.step(BOOT, 1, 1, None, [(e.seq, e.attempt, Fate.TRAINED) for e in entries])
    assert await broker.commit(BOOT, 0, (0, 1), [0, 1]) == "fenced"
    assert await broker.commit(BOOT, 1, (1, 0), [0, 1]) == "done"
    batch = await broker.batch(0, "learner")
    assert batch is not None
    assert (batch.body, valkey.payloads) == (LARGE * 2, [payload])
    assert await broker.commit(BOOT, 1, (1, 1), [0, 1]) == "done"
    assert valkey.payloads == []


async def test_a_fate_forgets_the_payload(valkey: ValkeyBench) -> None:
    broker, entries = await taken(valkey)
    await broker.fate(entries[0], Fate.FILTERED)
    assert [p.name for p in valkey.payloads] == [entries[1].ref]


async def test_a_released_payload_is_still_there(valkey: ValkeyBench) -> None:
    broker, entries = await taken(valkey)
    await broker.release(entries)
    assert [e.body for e in await broker.read(Stage.ISSUED, "b", 4)] == [LARGE, LARGE]


async def test_a_rebuild_sweeps_the_payloads_of_other_lives_and_nothing_else(valkey: ValkeyBench) -> None:
    broker, _ = await taken(valkey)
    (valkey.blobs / "notes.txt").write_text("somebody's")
    assert await broker.rebuild("b2", 0, 0, {}, None) == "fenced"
    assert len(valkey.payloads) == 3
    assert await broker.rebuild("b2", 1, 0, {}, None) == "done"
    assert [p.name for p in valkey.payloads] == ["notes.txt"]


async def test_a_commit_sweeps_what_a_lost_reply_left_of_its_groups(valkey: ValkeyBench) -> None:
    broker, _ = await taken(valkey)
    folder = BlobFolder(valkey.blobs)
    orphan = folder.write(f"{BOOT}.1", Stage.SCORED, 7, "0" * 32, b"x")
    await broker.commit(BOOT, 1, (1, 0), [6])
    assert (valkey.blobs / orphan).exists()
    await broker.commit(BOOT, 1, (1, 0), [7])
    assert not (valkey.blobs / orphan).exists()
    assert len(valkey.payloads) == 2


def test_a_full_disk_is_told_with_the_bytes_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, body: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StreamError, match=r"is full: a payload needs 120 bytes and .* are free"):
        BlobFolder(tmp_path).write("b1.1", Stage.ISSUED, 0, "0" * 32, LARGE)
    assert list(tmp_path.iterdir()) == []


async def test_payloads_of_many_hands_at_once_do_not_mix(valkey: ValkeyBench) -> None:
    broker, entries = await taken(valkey)
    words = await asyncio.gather(*(broker.hand([HandOff(e, LARGE + b"%d" % i)]) for i in range(4) for e in entries))
    assert sorted(word for [word] in words) == ["already"] * 6 + ["done"] * 2
    handed = await broker.read(Stage.GENERATED, "t", 4)
    assert [p.name for p in valkey.payloads] == sorted(e.ref for e in handed)
    assert all(not e.problem for e in handed)
