"""What cannot be trusted is quarantined with its reason, and the run goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest
import redis
import xxhash

from tests.run.runs import SMALL, Live, accounts_are_exact, live_run, streamopd

pytestmark = [pytest.mark.kill, pytest.mark.timeout(400)]


def client(folder: Path) -> redis.Redis:
    address = json.loads((folder / "state" / "broker.json").read_text())
    return redis.Redis.from_url(address["url"], password=address["password"])


def held_rollouts(live: Live, broker: redis.Redis, stream: str, count: int) -> list[dict[bytes, bytes]]:
    """Real entries of `rollouts`, taken out while the teacher is stopped: their last ones, which it has not been given."""
    live.wait(lambda: broker.xlen(stream) - broker.xpending(stream, "readers")["pending"] > count)
    rows = broker.xrevrange(stream, count=count)
    broker.xdel(stream, *(id for id, _ in rows))
    return [fields for _, fields in rows]


def changed(good: dict[bytes, bytes], body: bytes, true_digest: bool = False) -> dict[bytes, bytes]:
    """The entry with another body; its size is told truly, its digest when asked."""
    digest = xxhash.xxh3_128_hexdigest(body).encode() if true_digest else good[b"digest"]
    return good | {b"body": body, b"size": str(len(body)).encode(), b"digest": digest}


def with_nan(body: bytes) -> bytes:
    """The same group with a NaN log-prob, as a broken generator would write it."""
    group = msgspec.msgpack.decode(body)
    rollout = next(field for field in group if isinstance(field, list) and field and isinstance(field[0], list))[0]
    logprobs = rollout[3]
    values = np.frombuffer(logprobs[2], "<f4").copy()
    values[0] = np.nan
    logprobs[2] = values.tobytes()
    return msgspec.msgpack.encode(group)


def test_garbage_is_quarantined_with_its_reason_while_the_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with live_run(folder, *SMALL) as live:
        live.wait(lambda: live.steps >= 8)
        broker, run_id = client(folder), (folder / "state" / "run_id").read_text()
        stream = f"{{{run_id}}}:rollouts"
        teacher = live.pid("teacher")
        os.kill(teacher, signal.SIGSTOP)
        goods = held_rollouts(live, broker, stream, 4)
        bodies = [good[b"body"] for good in goods]
        flipped = bytearray(bodies[0])
        flipped[len(flipped) // 2] ^= 0x40
        for garbage in (
            changed(goods[0], bytes(flipped)),
            changed(goods[1], bodies[1][:-20], true_digest=True),
            changed(goods[2], with_nan(bodies[2]), true_digest=True),
            changed(goods[3], b"x" * (100 << 20)),
        ):
            broker.xadd(stream, garbage)
        broker.xadd(stream, {"hello": "world"})
        os.kill(teacher, signal.SIGCONT)
        live.wait(lambda: live.steps >= 30)
        said = streamopd("quarantine", str(folder)).stdout
        found = live.end()
    assert found["status"] == "completed"
    accounts_are_exact(found)
    for reason in ("digest", "truncated", "nan", "over the cap", "malformed"):
        assert reason in said, f"{reason!r} is not among:\n{said}"
