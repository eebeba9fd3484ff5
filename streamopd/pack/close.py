"""A step's groups become one batch."""

from __future__ import annotations

from collections.abc import Sequence

from streamopd.errors import GarbageRecord
from streamopd.schemas import Batch, Scored


def to_batch(n: int, run: str, method: str, born_s: float, items: Sequence[Scored]) -> Batch:
    """Batch `n` of `items`, in their order, in which their fates come back. GarbageRecord on mixed runs or methods."""
    for item in items:
        if (item.run, item.method) != (run, method):
            raise GarbageRecord(
                f"Group {item.group.id} is of run {item.run!r}, method {item.method!r}; "
                f"batch {n} is of run {run!r}, method {method!r}."
            )
    return Batch(id=f"b{n}", run=run, method=method, born_s=born_s, n=n, items=list(items))
