"""How a record travels: its digest and size beside it, so that a reader knows whether to trust what it got."""

from __future__ import annotations

import xxhash


def digest_of(body: bytes) -> str:
    """xxh3-128 of the bytes, hex."""
    return xxhash.xxh3_128_hexdigest(body)


def problem_with(body: bytes, size: int, digest: str, max_bytes: int) -> str:
    """Why `body` is not what was sent, or ""."""
    if size > max_bytes or len(body) > max_bytes:
        return f"a record of {max(size, len(body)):,} bytes is over the cap of {max_bytes:,}"
    if len(body) != size:
        return f"the record has {len(body):,} bytes, its entry says {size:,}"
    if digest_of(body) != digest:
        return f"the record's digest is {digest_of(body)}, its entry says {digest}"
    return ""
