"""Ways to look at a run that goes on, from outside."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from streamopd.stream import Broker
from streamopd.watch.status import status_lines
from streamopd.worker import Run


def show_status(folder: Path) -> int:
    """The bottleneck first, then who waits for whom."""
    return asyncio.run(_look(folder, _status))


def show_quarantine(folder: Path) -> int:
    """One line an item: when, who, why."""
    return asyncio.run(_look(folder, _quarantine))


async def _look(folder: Path, show) -> int:  # type: ignore[no-untyped-def]
    broker = await Run.open(folder.resolve()).connect()
    try:
        await show(broker)
    finally:
        await broker.close_connection()
    return 0


async def _status(broker: Broker) -> None:
    counters, beats = await broker.counters(), await broker.beats()
    for line in status_lines(counters, beats, time.time()):
        print(line)
    print(f"step {counters.steps}, {counters.issued} groups issued, {counters.fated} fated; in flight: {counters.inflight}")


async def _quarantine(broker: Broker) -> None:
    for item in await broker.quarantined():
        print(f"{item.get('source', '?')}: group {item.get('seq', '?')}: {item.get('reason', '?')}")
