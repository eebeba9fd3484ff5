"""The two brokers behind one fixture: every test here holds for both."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from streamopd.stream.broker import Limits
from streamopd.stream.server import Server, start_server

from .benches import Bench, MemoryBench, ValkeyBench

LIMITS = Limits(groups_per_step=2, max_staleness=1, cap_bytes=1000, blob_bytes=64, max_record_bytes=4096)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def memory_folder() -> Iterator[Path]:
    """In memory where the system has such a place, so that fsync costs nothing."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if place.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def server(memory_folder: Path) -> Iterator[Server]:
    server = start_server(memory_folder / "redis")
    yield server
    server.stop()


@pytest.fixture(params=["memory", "valkey"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    if request.param == "memory":
        bench: Bench = MemoryBench(LIMITS)
    else:
        folder = request.getfixturevalue("memory_folder")
        bench = ValkeyBench(LIMITS, request.getfixturevalue("server"), folder)
    yield bench
    await bench.close()
