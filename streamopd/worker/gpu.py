"""One device a replica: an engine hands every replica of a service all of its devices, so they share them out in the broker."""

from __future__ import annotations

import asyncio
import contextlib
import os

from streamopd.errors import StreamError
from streamopd.worker.worker import Worker

SLOTS_ENV = "STREAMOPD_GPU_SLOTS"  # "0,1": a replica on each of two devices; "0,0": two on one
RETRY_S = 1.0


async def lease_gpu(worker: Worker) -> None:
    """Hold one slot of STREAMOPD_GPU_SLOTS while this process lives, and see its device alone. Must come before torch is imported."""
    devices = [word.strip() for word in os.environ.get(SLOTS_ENV, "").split(",") if word.strip()]
    if not devices:
        return
    slot = await _free_slot(worker, len(devices))
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[slot]
    worker.in_background(_keep(worker, slot))
    await worker.emit("slot", f"{worker.instance} has GPU slot {slot}, device {devices[slot]}", slot=slot, device=devices[slot])


async def _free_slot(worker: Worker, count: int) -> int:
    """The first slot that nobody of this service holds; waited for, visibly."""
    told = False
    while True:
        for slot in range(count):
            if await worker.broker.hold(_name(worker, slot), worker.instance, _ttl_s(worker)):
                return slot
        worker.leave_if_asked()
        if not told:
            told = True
            await worker.emit("waits", f"{worker.instance} waits for a GPU slot: all {count} of {SLOTS_ENV} are taken")
        with worker.waiting(f"one of {count} GPU slots"):
            await asyncio.sleep(RETRY_S)


async def _keep(worker: Worker, slot: int) -> None:
    """A killed process loses its slot by time. One that lost it otherwise (the broker was away for long) must not go on beside another."""
    try:
        while True:
            await asyncio.sleep(_ttl_s(worker) / 4)
            if not await worker.broker.hold(_name(worker, slot), worker.instance, _ttl_s(worker)):
                raise StreamError(f"GPU slot {slot} was given to another {worker.service} while this one could not renew it.")
    finally:
        with contextlib.suppress(Exception):
            await worker.broker.drop_hold(_name(worker, slot), worker.instance)


def _name(worker: Worker, slot: int) -> str:
    return f"gpu:{worker.service}:{slot}"


def _ttl_s(worker: Worker) -> float:
    return worker.run.config.stream.lease_ttl_s
