"""Replicas that are handed the same devices share them out in the broker."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from streamopd import config as configs
from streamopd.stream.memory import MemoryBroker, MemoryStore
from streamopd.worker import Run, Worker
from streamopd.worker.gpu import SLOTS_ENV, lease_gpu

pytestmark = pytest.mark.anyio


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config, _ = configs.load("quickstart", ["stream.lease_ttl_s=0.4"])
    return Run.create(tmp_path, config)


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SLOTS_ENV, "3,5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")


def replica(run: Run, store: MemoryStore, name: str, service: str = "generator") -> Worker:
    return Worker(run, service, name, MemoryBroker(run.limits, store), inline=True)


async def device(worker: Worker, within_s: float = 10.0) -> str:
    await asyncio.wait_for(lease_gpu(worker), within_s)
    return os.environ["CUDA_VISIBLE_DEVICES"]


async def test_each_replica_of_a_service_gets_a_device_of_its_own(run: Run) -> None:
    store = MemoryStore()
    async with replica(run, store, "a") as a, replica(run, store, "b") as b, replica(run, store, "t", "teacher") as teacher:
        assert [await device(a), await device(b), await device(teacher)] == ["3", "5", "3"]
        async with replica(run, store, "c") as c:
            with pytest.raises(TimeoutError):
                await device(c, 1.5)  # longer than a lease lasts: a and b keep theirs
        events = [event.text for _, event in store.events if event.kind == "waits"]
        assert events == [f"c waits for a GPU slot: all 2 of {SLOTS_ENV} are taken"]


async def test_the_slot_of_a_replica_that_is_gone_is_given_to_the_next(run: Run) -> None:
    store = MemoryStore()
    async with replica(run, store, "b") as b:
        async with replica(run, store, "a") as a:
            assert [await device(a), await device(b)] == ["3", "5"]
        async with replica(run, store, "c") as c:
            assert await device(c) == "3"


async def test_without_slots_every_device_is_seen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SLOTS_ENV)
    async with replica(run, MemoryStore(), "a") as a:
        assert await device(a) == "3,5"
