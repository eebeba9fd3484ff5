"""One way to reach a broker."""

from __future__ import annotations

from pathlib import Path

from .broker import Broker, Limits
from .redis import RedisBroker


async def open_broker(url: str, run: str, limits: Limits, blob_dir: Path, user: str = "", password: str = "") -> Broker:
    """A client of `run` at `url`: UserError when that server cannot carry the protocol, StreamError when it is silent."""
    return await RedisBroker.connect(url, run, limits, blob_dir, username=user, password=password)
