"""Two brokers seen from outside: their content as one View, and the faults that a test may inject."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
from redis import asyncio as client

from streamopd.stream.blobs import BlobFolder
from streamopd.stream.broker import Broker, Limits
from streamopd.stream.memory import MemoryBroker, MemoryStore
from streamopd.stream.redis import RedisBroker
from streamopd.stream.server import Server
from streamopd.topology import STREAMS, Stage

HOUR_S = 3600.0
_runs = itertools.count(1)


@dataclass
class View:
    """Everything the protocol keeps."""

    boot: str
    stamped: bool
    lineage: int
    issued: int
    fated: int
    steps: int
    batchno: int
    nbytes: int
    end: str
    weights_n: int
    committed: tuple[int, int]
    state: dict[int, tuple[str, int]]
    again: list[int]
    fates: dict[int, str]
    kills: dict[str, int]
    entries: list[tuple[int, str, int, str]]      # (stage, id, seq, attempt), batches aside
    batches: dict[int, tuple[tuple[int, str], ...]]


class Bench(Protocol):
    limits: Limits

    async def client(self) -> Broker: ...
    async def view(self) -> View: ...
    async def inject(self, stage: Stage, **fields: Any) -> None:
        """What a stranger's XADD leaves; `None` leaves a field out."""
    async def spoil(self, stage: Stage, seq: int, **fields: Any) -> None:
        """Replace fields of the undelivered entry of `seq`."""
    async def lose_entry(self, stage: Stage, seq: int) -> None:
        """Somebody deletes the entry of `seq`."""
    async def abandon(self, stage: Stage, consumer: str) -> None:
        """Let the entries of `consumer` look untouched for an hour."""
    async def wipe(self) -> None: ...
    async def restart(self) -> None:
        """Another server process answers, with the same content."""
    async def snapshot(self) -> Any: ...
    async def roll_back(self, snapshot: Any) -> None: ...
    async def close(self) -> None: ...


class MemoryBench:
    kind = MemoryBroker

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.now = 0.0
        self.store = MemoryStore(clock=lambda: self.now)

    async def client(self) -> Broker:
        return self.kind(self.limits, self.store)

    async def view(self) -> View:
        life = self.store.life
        stamped = life.process == self.store.process
        entries = [
            (int(stage), id, fields.get("seq", -1), fields.get("attempt", ""))
            for stage in (Stage.ISSUED, Stage.GENERATED, Stage.SCORED) for id, fields in life.streams[stage].entries.items()
        ]
        batches = {n: life.streams[Stage.BATCHED].entries[id]["members"] for n, id in life.kept.items()}
        return View(
            life.boot, stamped, life.lineage, life.issued, life.fated, life.steps, life.batchno, sum(life.sizes.values()),
            life.end, life.weights.n if life.weights else -1, life.committed,
            {seq: (attempt, int(stage)) for seq, (attempt, stage) in life.state.items()}, list(life.again),
            dict(life.fates), {str(k): v for k, v in life.kills.items() if v}, sorted(entries), batches,
        )

    async def inject(self, stage: Stage, **fields: Any) -> None:
        kept = {name: value for name, value in fields.items() if value is not None}
        self.store.life.streams[stage].entries[self.store.next_id()] = kept

    async def spoil(self, stage: Stage, seq: int, **fields: Any) -> None:
        entry = next(f for f in self.store.life.streams[stage].entries.values() if f["seq"] == seq)
        entry.update(fields)

    async def lose_entry(self, stage: Stage, seq: int) -> None:
        entries = self.store.life.streams[stage].entries
        for id in [id for id, fields in entries.items() if fields["seq"] == seq]:
            del entries[id]

    async def abandon(self, stage: Stage, consumer: str) -> None:
        held = self.store.life.streams[stage].held
        for id, (holder, since) in held.items():
            if holder == consumer:
                held[id] = (holder, since - HOUR_S)

    async def wipe(self) -> None:
        self.store.wipe()

    async def restart(self) -> None:
        self.store.restart()

    async def snapshot(self) -> Any:
        return self.store.snapshot()

    async def roll_back(self, snapshot: Any) -> None:
        self.store.roll_back(snapshot)

    async def close(self) -> None:
        return


class ValkeyBench:
    """A run of its own on a shared server."""

    def __init__(self, limits: Limits, server: Server, folder: Path) -> None:
        self.limits, self.server = limits, server
        self.run = f"run-{next(_runs)}"
        self.blobs = folder / self.run
        self.raw: Any = client.Redis.from_url(server.url, password=server.password, protocol=2)
        self.clients: list[RedisBroker] = []
        self.snapshots = itertools.count(1)

    async def client(self) -> Broker:
        if len(self.clients) >= 8:  # replicas come and go; a crashed one's client is as good as a new one
            self.clients.append(self.clients.pop(0))
            return self.clients[-1]
        broker = await RedisBroker.connect(
            self.server.url, self.run, self.limits, self.blobs, password=self.server.password
        )
        self.clients.append(broker)
        return broker

    def key(self, name: str) -> str:
        return f"{{{self.run}}}:{name}"

    async def view(self) -> View:
        pipe = self.raw.pipeline(transaction=True)
        for name in ("lineage", "issued", "fated", "steps", "batchno", "bytes", "end"):
            pipe.get(self.key(name))
        for name in ("boot", "weights", "committed", "state", "fates", "kills", "kept"):
            pipe.hgetall(self.key(name))
        pipe.lrange(self.key("again"), 0, -1)
        for stage in Stage:
            pipe.xrange(self.key(stage.stream))
        pipe.info("server")
        rows = await pipe.execute()
        lineage, issued, fated, steps, batchno, nbytes = (int(x or 0) for x in rows[:6])
        boot, weights, committed, state, fates, kills, kept = map(_texts, rows[7:14])
        again, streams, info = [int(x) for x in rows[14]], rows[15:19], rows[19]
        entries = [
            (stage, id.decode(), int(fields.get(b"seq", -1)), fields.get(b"attempt", b"").decode())
            for stage, stream in zip((1, 2, 3), streams[:3], strict=True) for id, fields in stream
        ]
        batches = {int(f[b"n"]): msgspec.json.decode(f[b"members"], type=tuple[tuple[int, str], ...])
                   for id, f in streams[3] if id.decode() in " ".join(kept.values())}
        return View(
            boot.get("nonce", ""), boot.get("run_id") == info["run_id"], lineage, issued, fated, steps, batchno, nbytes,
            (rows[6] or b"").decode(), int(weights.get("n", -1)),
            (int(committed.get("lineage", 0)), int(committed.get("n", 0))),
            {int(seq): (at[:-2], int(at[-1])) for seq, at in state.items()}, again,
            {int(seq): why for seq, why in fates.items()}, {k: int(v) for k, v in kills.items()}, sorted(entries), batches,
        )

    async def inject(self, stage: Stage, **fields: Any) -> None:
        if await self.raw.exists(self.key(stage.stream)):
            await self.raw.xadd(self.key(stage.stream), {k: v for k, v in fields.items() if v is not None})

    async def spoil(self, stage: Stage, seq: int, **fields: Any) -> None:
        id, old = await self._find(stage, seq)
        await self.raw.xdel(self.key(stage.stream), id)
        await self.raw.xadd(self.key(stage.stream), old | {name.encode(): value for name, value in fields.items()})

    async def lose_entry(self, stage: Stage, seq: int) -> None:
        await self.raw.xdel(self.key(stage.stream), (await self._find(stage, seq))[0])

    async def _find(self, stage: Stage, seq: int) -> tuple[bytes, dict[bytes, Any]]:
        rows = await self.raw.xrange(self.key(stage.stream))
        return next((id, fields) for id, fields in rows if int(fields[b"seq"]) == seq)

    async def abandon(self, stage: Stage, consumer: str) -> None:
        if not await self.raw.exists(self.key(stage.stream)):
            return
        rows = await self.raw.xpending_range(self.key(stage.stream), "readers", "-", "+", 1000, consumer)
        for row in rows:
            await self.raw.xclaim(
                self.key(stage.stream), "readers", consumer, 0, [row["message_id"]], idle=int(HOUR_S * 1000), justid=True
            )

    async def wipe(self) -> None:
        await self._delete(await self._keys())

    async def restart(self) -> None:
        if await self.raw.exists(self.key("boot")):
            await self.raw.hset(self.key("boot"), "run_id", "0123")

    async def snapshot(self) -> Any:
        name = f"snapshot-{next(self.snapshots)}:"
        for key in await self._keys():
            await self.raw.copy(key, name + key, replace=True)
        return name

    async def roll_back(self, snapshot: Any) -> None:
        await self._delete(await self._keys())
        for key in await self._keys(snapshot):
            await self.raw.copy(key, key.removeprefix(snapshot), replace=True)
        await self.restart()

    async def _keys(self, prefix: str = "") -> list[str]:
        pattern = prefix + re.sub(r"([\[\]*?])", r"\\\1", self.key("*"[:0])) + "*"
        return [key.decode() async for key in self.raw.scan_iter(match=pattern, count=1000)]

    async def _delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            await self.raw.delete(key)

    async def close(self) -> None:
        await self._delete(await self._keys("*"))
        for broker in self.clients:
            await broker.close_connection()
        await self.raw.aclose()

    @property
    def payloads(self) -> list[Path]:
        return sorted(BlobFolder(self.blobs).folder.iterdir())


def _texts(fields: dict[bytes, bytes]) -> dict[str, str]:
    return {k.decode(): v.decode() for k, v in fields.items()}


__all__ = ["STREAMS", "Bench", "MemoryBench", "ValkeyBench", "View"]
