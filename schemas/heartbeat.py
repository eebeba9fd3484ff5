"""Signs of life, and what happened."""

from __future__ import annotations

from msgspec import Struct


class Heartbeat(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """One service instance now. Liveness is `progress` moving, not this record arriving."""

    service: str                     # "generator"
    instance: str                    # "generator-0"
    pid: int
    born_s: float
    progress: int                    # moves with the work: tokens, items, micro-batches
    state: str                       # starting | working | waiting | behind | draining
    waits_for: str = ""              # "rollouts", "weights >= 12", ...
    version: int = -1                # weights served, -1: none
    counters: dict[str, float] = {}


class Event(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """Something a person may want to know: joins, leaves, swaps, quarantines, drops, alarms."""

    kind: str
    source: str                      # the instance
    born_s: float
    text: str = ""
    data: dict[str, float | str] = {}
