"""Bytes and back, with caps: any byte string gives a record or a ValueError that says what is wrong."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
MAX_RECORD_BYTES = 64 << 20

_encoder = msgspec.msgpack.Encoder()


_decoders: dict[type[Any], msgspec.msgpack.Decoder[Any]] = {}


def _decoder(kind: type[Any]) -> msgspec.msgpack.Decoder[Any]:
    """Made once for each kind: making one costs more than decoding."""
    if kind not in _decoders:
        _decoders[kind] = msgspec.msgpack.Decoder(kind)
    return _decoders[kind]


def encode(record: Any) -> bytes:
    """The record as msgpack."""
    return _encoder.encode(record)


def decode(kind: type[T], body: bytes, max_bytes: int = MAX_RECORD_BYTES) -> T:
    """A `kind` from `body`; ValueError on an over-size, truncated, mistyped or inconsistent record."""
    if len(body) > max_bytes:
        raise ValueError(f"a {kind.__name__} of {len(body):,} bytes is over the cap of {max_bytes:,}")
    try:
        record: T = _decoder(kind).decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"not a {kind.__name__}: {error}") from None
    return record
