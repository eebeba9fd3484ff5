"""Each service does its own part of the journey as its own user, and nothing of another's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis
from redis.exceptions import AuthenticationError, NoPermissionError

from streamopd.cli.credentials import ACL, write_secrets
from streamopd.errors import StreamError
from streamopd.schemas import Event, Fate, Heartbeat
from streamopd.stream.acl import USERS
from streamopd.stream.broker import Broker, HandOff, Limits
from streamopd.stream.open import open_broker
from streamopd.topology import SERVICES, Stage

from .test_laws import manifest
from .test_server import foreign

pytestmark = pytest.mark.anyio
LIMITS = Limits(groups_per_step=2, max_staleness=1)
Users = dict[str, Broker]


@pytest.fixture
async def users(memory_folder: Path, tmp_path: Path) -> AsyncIterator[Users]:
    """A client of one server for each user."""
    write_secrets(tmp_path / "secrets")
    with foreign(memory_folder / tmp_path.name, "--aclfile", str(tmp_path / "secrets" / ACL)) as url:
        clients: Users = {}
        for user in USERS:
            name, _, password = (tmp_path / "secrets" / user).read_text().partition(":")
            clients[user] = await open_broker(url, "r", LIMITS, tmp_path / "blobs", name, password)
        yield clients
        for client in clients.values():
            await client.close_connection()


async def test_a_journey_with_one_user_a_service(users: Users) -> None:
    assert await users["learner"].rebuild("b1", 1, 0, {}, manifest(0)) == "done"
    assert await users["feeder"].hold("feeder", "me", 5.0)
    assert await users["feeder"].issue("b1", [(0, b"p0"), (1, b"p1"), (2, b"p2")]) == ["done"] * 3
    await users["feeder"].drain("b1", 3)
    for service, stage in (("generator", Stage.ISSUED), ("teacher", Stage.GENERATED)):
        held = await users[service].read(stage, "me", 3, block_s=0.1)
        await users[service].renew(stage, "me", [entry.id for entry in held])
        await users[service].release(held[2:])
        [again] = await users[service].read(stage, "me", 1, block_s=0.1)
        assert await users[service].hand([HandOff(entry, b"x" * 9) for entry in [*held[:2], again]]) == ["done"] * 3
        assert await users[service].reap(stage, "you", 0.0, 3) == []
    packed = await users["packer"].sweep(Stage.SCORED, "me", set(), 9)
    assert await users["packer"].fate(packed[2], Fate.FILTERED, "dull") == "done"
    assert (await users["packer"].close(packed[:2], 0, b"batch"))[0] == "done"
    batch = await users["learner"].batch(0, "me", 0.1)
    assert batch is not None
    assert await users["learner"].start_batch("b1", 1, 0) == 1
    trained = [(seq, attempt, Fate.TRAINED) for seq, attempt in batch.members]
    assert await users["learner"].step("b1", 1, 1, manifest(1), trained) == "done"
    assert await users["learner"].commit("b1", 1, (1, 1), [0, 1, 2]) == "done"
    for service in SERVICES:
        found = await users[service].weights()
        assert found is not None
        assert found.n == 1
        await users[service].news(0.05)
        await users[service].emit(Event(kind="join", source=service, born_s=0.0))
        await users[service].beat(Heartbeat(service=service, instance=service, pid=1, born_s=0.0, progress=0, state="working"))
        await users[service].quarantine(service, "odd", b"x")
    assert len(await users["supervisor"].beats()) == len(SERVICES)
    assert len(await users["supervisor"].quarantined()) == len(SERVICES)
    assert (await users["supervisor"].counters()).fated == 3


@pytest.mark.parametrize("service", [service for service in USERS if service != "learner"])
async def test_nobody_but_the_learner_writes_weights_or_leads(users: Users, service: str) -> None:
    await users["learner"].rebuild("b1", 1, 0, {}, manifest(0))
    for call in (
        users[service].step("b1", 1, 1, manifest(1), []),
        users[service].rebuild("b2", 2, 0, {}, manifest(0)),
        users[service].lead("b1", 2, True),
    ):
        with pytest.raises(StreamError, match=r"permissions|ACL"):
            await call
    assert (await users["learner"].counters()).steps == 0


@pytest.mark.parametrize(("service", "theirs"), [("generator", "scored"), ("generator", "weights"), ("teacher", "prompts"),
                                                 ("feeder", "rollouts"), ("evaluator", "prompts"), ("packer", "steps")])
async def test_a_service_cannot_write_what_another_writes(users: Users, service: str, theirs: str) -> None:
    with pytest.raises(NoPermissionError):
        await users[service]._commands.xadd(f"{{r}}:{theirs}", {"x": "y"})  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["FLUSHALL", "KEYS *", "CONFIG SET save x", "ACL LIST", "SHUTDOWN", "GET outside"])
async def test_a_worker_may_neither_manage_the_server_nor_look_outside_its_runs(users: Users, command: str) -> None:
    with pytest.raises(NoPermissionError):
        await users["generator"]._commands.execute_command(*command.split())  # type: ignore[attr-defined]


async def test_without_a_password_the_server_answers_nothing(memory_folder: Path, tmp_path: Path) -> None:
    write_secrets(tmp_path / "secrets")
    with foreign(memory_folder / tmp_path.name, "--aclfile", str(tmp_path / "secrets" / ACL)) as url, redis.Redis.from_url(url) as stranger:
        for command in ("PING", "INFO", "GET x"):
            with pytest.raises(AuthenticationError):
                stranger.execute_command(*command.split())


def test_secrets_are_private_and_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    made = write_secrets(folder)
    assert {file.name for file in made} == {*USERS, ACL}
    assert all(file.stat().st_mode & 0o777 == 0o400 for file in made)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len({before[user] for user in USERS}) == len(USERS)
    assert not any(before[user].partition(b":")[2] in before[ACL] for user in USERS)
    assert write_secrets(folder) == []
    (folder / ACL).unlink()
    (folder / ACL).write_text("user learner on nopass")  # of another version
    assert {file.name for file in write_secrets(folder)} == {ACL}
    (folder / "teacher").unlink()
    assert {file.name for file in write_secrets(folder)} == {"teacher", ACL}
    assert (folder / "learner").read_bytes() == before["learner"]
