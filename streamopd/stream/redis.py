"""The stream protocol on Redis 7.0 or Valkey: each change is one call of `scripts.lua`, which carries the atomicity.

The client retries nothing (a cut reply retried by a library is an entry twice): a lost reply is a StreamError, and the
caller repeats the call, which changes nothing the second time.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import redis.asyncio as client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    NoScriptError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)

from streamopd.errors import StreamError, UserError
from streamopd.schemas import Event, Fate, Heartbeat, Weights, decode, encode
from streamopd.tasks import cancel_until_done
from streamopd.topology import STREAMS, Stage

from .blobs import BlobFolder
from .broker import BatchEntry, Counters, End, Entry, Finished, HandOff, Limits
from .envelope import digest_of, problem_with

SOURCE = Path(__file__).with_name("scripts.lua").read_text()
AT_THE_DOOR = "#!lua\n" + SOURCE             # refused when the server's memory is full: it would let more work in
INSIDE = "#!lua flags=allow-oom\n" + SOURCE  # the others make room, so they must go on
SHA = {text: hashlib.sha1(text.encode()).hexdigest() for text in (AT_THE_DOOR, INSIDE)}

REPLY_S = 10.0      # a command that has no reply after this is lost
CONNECT_S = 3.0
MAX_BLOCK_S = 5.0   # a blocking read waits so long at most; its connection a little longer
GROUP = "readers"
FLOOR = (7, 0)

T = TypeVar("T")
Seal = tuple[str, int, str]  # digest, size, blob name or ""


class RedisBroker:
    """One client of one run's streams on a Redis or Valkey server. See `broker.Broker` for what each call promises."""

    def __init__(self, url: str, run: str, limits: Limits, blobs: BlobFolder, **credentials: str | None) -> None:
        self.limits = limits
        self._blobs = blobs
        self._prefix = f"{{{run}}}"  # a hash tag: all keys of a run in one slot
        self._where = url.rpartition("@")[2]
        self._commands = _open(url, REPLY_S, 16, credentials)
        self._reader = _open(url, MAX_BLOCK_S + 2.5, 4, credentials)
        self._woken: dict[tuple[Stage, str], list[str]] = {}   # delivered by a blocking read, not yet admitted
        self._news = asyncio.Event()
        self._listener: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls, url: str, run: str, limits: Limits, blob_dir: Path, *,
        username: str | None = None, password: str | None = None,
    ) -> RedisBroker:
        """A client whose server was found to be one this protocol can stand on."""
        broker = cls(url, run, limits, BlobFolder(blob_dir), username=username, password=password)
        try:
            async with broker._speaking():
                await check_server(broker._commands, broker._where)
        except BaseException:
            await broker.close_connection()
            raise
        return broker

    async def close_connection(self) -> None:
        if self._listener:
            await cancel_until_done(self._listener)
        try:
            await self._commands.aclose()
        finally:
            await self._reader.aclose()

    # ---- identity
    async def boot(self) -> str:
        return _text(await self._call("boot"))

    async def durable(self) -> bool:
        async with self._speaking():
            return await _loses_nothing(self._commands)

    async def counters(self) -> Counters:
        row = await self._call("counters")
        if not row:
            return Counters()
        boot, stamped, issued, fated, steps, batchno, end, again, depths, pending, inflight, nbytes, weights_n = row
        return Counters(
            _text(boot), bool(stamped), issued, fated, steps, batchno, cast(End, _text(end)), tuple(map(int, again)),
            dict(zip(STREAMS.values(), depths, strict=True)), dict(zip(STREAMS.values(), pending, strict=True)),
            {stage.name.lower(): inflight[stage - 1] for stage in Stage}, nbytes, weights_n,
        )

    async def weights(self) -> Weights | None:
        async with self._speaking():
            manifest = await self._commands.hget(self._key("weights"), "manifest")
        try:
            return msgspec.json.decode(manifest, type=Weights) if manifest else None
        except msgspec.MsgspecError as error:
            raise StreamError(f"The manifest at {self._where} is not one of ours: {error}") from error

    # ---- feeder
    async def issue(self, boot: str, prompts: Sequence[tuple[int, bytes]]) -> list[str]:
        limits, seqs = self.limits, [seq for seq, _ in prompts]
        seals, bodies = await self._seal([(f"{boot}.1", Stage.ISSUED, seq, body) for seq, body in prompts])
        answer = await self._call(
            "issue", bodies, boot=boot, seqs=seqs, seals=seals, staleness=limits.max_staleness, cap=limits.cap_bytes,
            window=(limits.max_staleness + 1) * limits.groups_per_step, per_step=limits.groups_per_step,
        )
        words = _words(answer, len(seqs))
        self._discard(seals, words + ["full"] * (len(seqs) - len(words)))
        return words

    async def drain(self, boot: str, issued: int) -> str:
        return _text(await self._call("drain", boot=boot, issued=issued))

    # ---- generator, teacher
    async def read(
        self, stage: Stage, consumer: str, count: int, block_s: float = 0.0, empty: bool = True
    ) -> list[Entry]:
        rows = await self._read(stage, consumer, count, empty)
        if rows == [] and block_s > 0:
            if await self._arrival(stage, consumer, block_s):
                rows = await self._read(stage, consumer, count, empty)
                if rows == []:
                    await asyncio.sleep(min(block_s, 0.05))  # put back for an empty reader: leave it a chance
        elif rows is None:
            await self.news(block_s)
        return await self._entries(stage, rows or [])

    async def own_pending(self, stage: Stage, consumer: str) -> list[Entry]:
        self._woken.pop((stage, consumer), None)
        return await self._entries(stage, await self._call("own_pending", **self._admission(stage, consumer)))

    async def hand(self, items: Sequence[HandOff]) -> list[str]:
        held = [item.entry for item in items]
        seals, bodies = await self._seal(
            [(item.entry.attempt, Stage(item.entry.stage + 1), item.entry.seq, item.body) for item in items]
        )
        answer = await self._call("hand", bodies, seals=seals, **_columns(held))
        words = _words(answer, len(items))
        self._discard(seals, words)
        self._forget(entry for entry, word in zip(held, words, strict=True) if word in ("done", "already"))
        return words

    async def release(self, entries: Sequence[Entry]) -> None:
        await self._call("release", ids=[e.id for e in entries], stages=[int(e.stage) for e in entries])

    async def renew(self, stage: Stage, consumer: str, ids: Sequence[str]) -> None:
        await self._call("renew", stage=int(stage), consumer=consumer, ids=list(ids))

    async def reap(
        self, stage: Stage, consumer: str, min_idle_s: float, count: int, empty: bool = True
    ) -> list[Entry]:
        admission = self._admission(stage, consumer, empty)
        return await self._entries(
            stage, await self._call("reap", idle_ms=int(min_idle_s * 1000), count=count, **admission)
        )

    # ---- anyone who holds an entry
    async def fate(self, entry: Entry, fate: Fate, reason: str = "") -> str:
        why = f"{fate.value}:{reason}" if reason else fate.value
        return await self._end_of(entry, await self._call("fate", fate=why, **_one(entry)))

    async def reissue(self, entry: Entry, reason: str) -> str:
        limit = self.limits.convict_after
        return await self._end_of(entry, await self._call("reissue", reason=reason, convict=limit, **_one(entry)))

    async def quarantine(self, source: str, reason: str, head: bytes, seq: int = -1) -> None:
        await self._call("quarantine", [head[:4096]], source=source, reason=reason, seq=seq)

    async def quarantined(self, count: int = 100) -> list[dict[str, str]]:
        async with self._speaking():
            rows = await self._commands.xrevrange(self._key("quarantine"), count=count)
        return [{_text(k): _text(v) for k, v in fields.items()} for _, fields in reversed(rows)]

    # ---- packer
    async def sweep(
        self, stage: Stage, consumer: str, known: set[str], count: int, block_s: float = 0.0
    ) -> list[Entry]:
        arguments = dict(self._admission(stage, consumer), known=sorted(known), count=count)
        rows = await self._call("sweep", **arguments)
        if rows == [] and block_s > 0:
            await self._arrival(stage, consumer, block_s)
            rows = await self._call("sweep", **arguments)
        elif not isinstance(rows, list):
            await self.news(block_s)
        self._woken.pop((stage, consumer), None)  # a sweep takes what pends under its own name anyway
        return await self._entries(stage, rows if isinstance(rows, list) else [])

    async def close(self, entries: Sequence[Entry], n: int, body: bytes) -> tuple[str, list[str]]:
        assert 0 < len(entries) <= self.limits.groups_per_step, "a step is at most groups_per_step groups"
        boot = entries[0].boot
        seals, bodies = await self._seal([(f"{boot}.0", Stage.BATCHED, n, body)])
        members = msgspec.json.encode([(e.seq, e.attempt) for e in entries]).decode()
        answer = await self._call(
            "close", bodies, boot=boot, n=n, members=members, per_step=self.limits.groups_per_step, seals=seals,
            **_columns(entries),
        )
        word, *stale = map(_text, answer)
        self._discard(seals, [word])
        self._forget(e for e in entries if word in ("done", "already") or e.id in stale)
        return word, stale

    # ---- learner
    async def lead(self, boot: str, lineage: int, restamp: bool) -> str:
        return _text(await self._call("lead", boot=boot, lineage=lineage, restamp=restamp))

    async def rebuild(
        self, boot: str, lineage: int, n: int, record: Mapping[int, str], manifest: Weights | None
    ) -> str:
        issued = 1 + max(record, default=-1)
        word = _text(await self._call(
            "rebuild", boot=boot, lineage=lineage, n=n, issued=issued, fated=len(record),
            again=[seq for seq in range(issued) if seq not in record], manifest=_json(manifest),
        ))
        if word == "done":
            await asyncio.to_thread(self._blobs.sweep, boot)
        return word

    async def committed(self) -> tuple[int, int]:
        async with self._speaking():
            lineage, n = await self._commands.hmget(self._key("committed"), "lineage", "n")
        return int(lineage or 0), int(n or 0)

    async def batch(self, n: int, consumer: str, block_s: float = 0.0) -> BatchEntry | None:
        row = await self._call("batch", n=n)
        if row == [] and block_s > 0:
            await self._arrival(Stage.BATCHED, consumer, block_s)
            row = await self._call("batch", n=n)
        elif not isinstance(row, list):
            await self.news(block_s)
        if not row or not isinstance(row, list):
            return None
        fields = _pairs(row[1])
        body, problem = b"", "the entry was deleted"
        if fields:
            body, problem = await self._open_body(
                fields.get("body", b""), _text(fields.get("ref", b"")), int(fields["size"]), _text(fields["digest"])
            )
        members = msgspec.json.decode(fields.get("members", b"[]"), type=tuple[tuple[int, str], ...])
        return BatchEntry(_text(row[0]), n, members, body, problem)

    async def start_batch(self, boot: str, lineage: int, n: int) -> int:
        return int(await self._call("start_batch", boot=boot, lineage=lineage, n=n))

    async def step(
        self, boot: str, lineage: int, n: int, manifest: Weights | None, fates: Sequence[tuple[int, str, Fate]]
    ) -> str:
        return _text(await self._call(
            "step", boot=boot, lineage=lineage, n=n, manifest=_json(manifest), seqs=[seq for seq, _, _ in fates],
            attempts=[attempt for _, attempt, _ in fates], fates=[fate.value for _, _, fate in fates],
        ))

    async def commit(self, boot: str, lineage: int, checkpoint: tuple[int, int], seqs: Sequence[int]) -> str:
        of, n = checkpoint
        word = _text(await self._call("commit", boot=boot, lineage=lineage, of=of, n=n, seqs=list(seqs)))
        if word == "done":
            await asyncio.to_thread(self._blobs.sweep, boot, n, set(seqs))
        return word

    async def fates(self) -> dict[int, str]:
        async with self._speaking():
            return {int(seq): _text(why) for seq, why in (await self._commands.hgetall(self._key("fates"))).items()}

    async def retained_bytes(self) -> int:
        return int(await self._call("retained"))

    async def finish(self, boot: str, lineage: int) -> Finished | str:
        answer = await self._call("finish", boot=boot, lineage=lineage)
        if not isinstance(answer, list):
            return _text(answer)
        pairs, unused, issued = answer
        fates = {int(seq): _text(why) for seq, why in _pairs(pairs).items()}
        return Finished(fates, tuple(sorted(map(int, unused))), issued)

    # ---- side channels
    async def hold(self, name: str, owner: str, ttl_s: float) -> bool:
        return bool(await self._call("hold", name=name, owner=owner, ttl_ms=int(ttl_s * 1000)))

    async def drop_hold(self, name: str, owner: str) -> None:
        await self._call("drop_hold", name=name, owner=owner)

    async def spend(self, name: str, tokens: int) -> int:
        async with self._speaking():
            return int(await self._commands.hincrby(self._key("spent"), name, tokens))

    async def beat(self, beat: Heartbeat) -> None:
        async with self._speaking():
            await self._commands.hset(self._key("beats"), beat.instance, encode(beat))

    async def beats(self) -> list[Heartbeat]:
        async with self._speaking():
            bodies = await self._commands.hvals(self._key("beats"))
        return [beat for beat in (_readable(Heartbeat, body) for body in bodies) if beat]

    async def emit(self, event: Event) -> None:
        async with self._speaking():
            await self._commands.xadd(self._key("events"), {"event": encode(event)}, maxlen=10_000)

    async def events(self, after: str = "0", count: int = 1000) -> list[tuple[str, Event]]:
        async with self._speaking():
            rows = await self._commands.xrange(self._key("events"), f"({after}", count=count)
        events = [(_text(id), _readable(Event, fields.get(b"event", b""))) for id, fields in rows]
        return [(id, event) for id, event in events if event]

    async def news(self, timeout_s: float) -> None:
        if self._listener is None or self._listener.done():
            self._listener = asyncio.create_task(self._listen())
        try:
            async with asyncio.timeout(timeout_s):  # wait_for loses a cancellation that comes with the news
                await self._news.wait()
        except TimeoutError:
            return
        self._news.clear()

    # ---- how
    def _key(self, name: str) -> str:
        return f"{self._prefix}:{name}"

    @asynccontextmanager
    async def _speaking(self) -> AsyncIterator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
            raise StreamError(f"The broker at {self._where} {_in_words(error)}") from error

    async def _call(self, script: str, bodies: Sequence[bytes] = (), /, **arguments: Any) -> Any:
        text = AT_THE_DOOR if script == "issue" else INSIDE
        packed = msgspec.msgpack.encode(arguments)
        async with self._speaking():
            try:
                return await self._commands.evalsha(SHA[text], 1, self._prefix, script, packed, *bodies)
            except NoScriptError:  # nothing ran: a fresh server, or somebody's SCRIPT FLUSH
                await self._commands.script_load(text)
                return await self._commands.evalsha(SHA[text], 1, self._prefix, script, packed, *bodies)

    async def _seal(self, records: Sequence[tuple[str, Stage, int, bytes]]) -> tuple[list[Seal], list[bytes]]:
        """(digest, size, ref) and the inline body of each (attempt, stage, number, body)."""
        large = [record for record in records if len(record[3]) > self.limits.blob_bytes]
        if large:
            return await asyncio.to_thread(self._seal_now, records)
        return self._seal_now(records)

    def _seal_now(self, records: Sequence[tuple[str, Stage, int, bytes]]) -> tuple[list[Seal], list[bytes]]:
        seals, bodies = [], []
        for attempt, stage, number, body in records:
            digest, ref = digest_of(body), ""
            if len(body) > self.limits.blob_bytes:
                ref = self._blobs.write(attempt, stage, number, digest, body)
            seals.append((digest, len(body), ref))
            bodies.append(b"" if ref else body)
        return seals, bodies

    def _discard(self, seals: Sequence[Seal], words: Sequence[str]) -> None:
        """A blob that did not land is nobody's."""
        self._blobs.remove(*(ref for (_, _, ref), word in zip(seals, words, strict=True) if ref and word != "done"))

    def _forget(self, entries: Iterable[Entry]) -> None:
        """Blobs of entries that are gone for good: their group has moved on, ended, or is another attempt."""
        self._blobs.remove(*(entry.ref for entry in entries if entry.ref))

    async def _end_of(self, entry: Entry, answer: Any) -> str:
        word = _text(answer)
        if word in ("done", "already"):
            self._forget([entry])
        return word

    def _admission(self, stage: Stage, consumer: str, empty: bool = True) -> dict[str, Any]:
        limits = self.limits
        return {
            "stage": int(stage), "consumer": consumer, "empty": empty, "convict": limits.convict_after,
            "max_bytes": limits.max_record_bytes,
        }

    async def _read(self, stage: Stage, consumer: str, count: int, empty: bool) -> list[Any] | None:
        woken = self._woken.get((stage, consumer), [])
        rows = await self._call("read", count=count, woken=woken, **self._admission(stage, consumer, empty))
        if not isinstance(rows, list):
            return None
        self._woken.pop((stage, consumer), None)
        return rows

    async def _arrival(self, stage: Stage, consumer: str, block_s: float) -> bool:
        """Wait until an entry is delivered to `consumer`, who now holds it; False after `block_s`."""
        block_ms = max(1, int(min(block_s, MAX_BLOCK_S) * 1000))
        try:
            async with self._speaking():
                streams = await self._reader.xreadgroup(
                    GROUP, consumer, {self._key(stage.stream): ">"}, count=1, block=block_ms
                )
        except StreamError as error:
            if not isinstance(error.__cause__, ResponseError):  # else NOGROUP, UNBLOCKED: wiped under the reader
                raise
            await self.news(block_s)
            return False
        self._woken.setdefault((stage, consumer), []).extend(_text(id) for _, rows in streams or [] for id, _ in rows)
        return bool(streams)

    async def _entries(self, stage: Stage, rows: Sequence[Any]) -> list[Entry]:
        return [await self._entry(stage, row) for row in rows]

    async def _entry(self, stage: Stage, row: Sequence[Any]) -> Entry:
        id, seq, attempt, min_version, alone, digest, size, ref, body, nbytes = row
        withheld = nbytes > len(body)  # over the cap: not worth the way here
        body, problem = await self._open_body(body, _text(ref), nbytes if withheld else int(size), _text(digest))
        return Entry(
            _text(id), stage, int(seq), _text(attempt), int(min_version), body, bool(alone), problem, _text(ref)
        )

    async def _open_body(self, body: bytes, ref: str, size: int, digest: str) -> tuple[bytes, str]:
        """The body that can be trusted and "", or b"" and the problem."""
        if ref and size <= self.limits.max_record_bytes:
            try:
                body = await asyncio.to_thread(self._blobs.read, ref, size)
            except ValueError as error:
                return b"", str(error)
        problem = problem_with(body, size, digest, self.limits.max_record_bytes)
        return b"" if problem else body, problem

    async def _listen(self) -> None:
        """Set `_news` at every message, and once at the start: what came before was not heard."""
        try:
            async with self._reader.pubsub(ignore_subscribe_messages=True) as channel:
                await channel.subscribe(self._key("news"))
                self._news.set()
                while True:
                    if await channel.get_message(timeout=MAX_BLOCK_S):
                        self._news.set()
        except (RedisError, OSError):
            return  # a hint, never a fact: the next `news` listens again


def _in_words(error: Exception) -> str:
    if isinstance(error, AuthenticationError):
        return f"refuses the password ({error}). Name the right one with redis.password_env."
    if isinstance(error, OutOfMemoryError):
        return f"lets no more work in: its memory is full ({error}). Raise its maxmemory, or lower stream.cap_mb."
    if isinstance(error, ResponseError):
        return f"refused a call: {error}"
    return f"did not answer ({type(error).__name__}: {error}). Is it running? Start it, or correct redis.url."


async def check_server(server: Any, where: str) -> None:
    """UserError when this server cannot carry the protocol."""
    version = str((await server.info("server"))["redis_version"])
    if refusal := refusal_of(version, str((await server.info("memory"))["maxmemory_policy"])):
        raise UserError(f"The broker at {where} {refusal}")


def refusal_of(version: str, policy: str) -> str:
    """What is wrong with a server of this version and eviction policy, or ""."""
    if tuple(int(part) for part in version.split(".")[:2]) < FLOOR:
        return (
            f"is Redis {version}; the streams need at least {FLOOR[0]}.{FLOOR[1]}. "
            "Use a newer Redis, Valkey, or no redis.url at all (an embedded Valkey)."
        )
    if policy != "noeviction":
        return (
            f"has maxmemory-policy {policy}; the streams need noeviction, or a full memory would delete work silently. "
            "Run: CONFIG SET maxmemory-policy noeviction"
        )
    return ""


async def _loses_nothing(server: Any) -> bool:
    """A restart of this server keeps every acknowledged write: one node, appendonly yes, appendfsync always."""
    replication = await server.info("replication")
    if replication["role"] != "master" or replication["connected_slaves"]:
        return False
    try:
        settings = await server.config_get("append*")
    except ResponseError:  # not for us to ask, or a managed server that has no such command
        return False
    return settings.get("appendonly") == "yes" and settings.get("appendfsync") == "always"


def _open(url: str, timeout_s: float, connections: int, credentials: Mapping[str, str | None]) -> Any:
    pool = client.BlockingConnectionPool.from_url(
        url, max_connections=connections, timeout=timeout_s, socket_timeout=timeout_s, socket_connect_timeout=CONNECT_S,
        retry=Retry(NoBackoff(), 0), retry_on_timeout=False, health_check_interval=0, socket_read_size=1 << 20,
        decode_responses=False, protocol=2, **{k: v for k, v in credentials.items() if v},
    )
    return client.Redis.from_pool(pool)


def _readable(kind: type[T], body: bytes) -> T | None:
    """What a side channel carries, or None for what a stranger put there."""
    try:
        return decode(kind, body)
    except ValueError:
        return None


def _columns(entries: Sequence[Entry]) -> dict[str, list[Any]]:
    return {
        "ids": [e.id for e in entries], "seqs": [e.seq for e in entries], "attempts": [e.attempt for e in entries],
        "stages": [int(e.stage) for e in entries], "min_versions": [e.min_version for e in entries],
    }


def _one(entry: Entry) -> dict[str, Any]:
    return {"id": entry.id, "seq": entry.seq, "attempt": entry.attempt, "stage": int(entry.stage)}


def _json(manifest: Weights | None) -> str:
    return msgspec.json.encode(manifest).decode() if manifest else ""


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _pairs(flat: Sequence[bytes]) -> dict[str, bytes]:
    return dict(zip(map(_text, flat[::2]), flat[1::2], strict=True))


def _words(answer: Any, count: int) -> list[str]:
    """One word an item; a guard's word stands for all."""
    return list(map(_text, answer)) if isinstance(answer, list) else [_text(answer)] * count
