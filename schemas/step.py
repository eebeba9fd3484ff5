"""What a step did, for the record and for people."""

from __future__ import annotations

from enum import Enum

from msgspec import Struct


class Fate(Enum):
    """Where a group ended. First writer wins."""

    TRAINED = "trained"
    FILTERED = "filtered"
    EXPIRED = "expired"
    DEAD = "dead"


class StepDone(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """Step `n - 1` is done and weights `n` exist. One line of metrics.jsonl."""

    n: int
    born_s: float
    metrics: dict[str, float]
    trained: list[int] = []              # seqs whose answers moved the weights: an account of its own beside the record
    age_steps: dict[str, int] = {}       # histogram: age -> trained tokens
    trained_lengths: dict[str, int] = {} # histogram: completion length (bins of 4) -> rollouts
    dropped_lengths: dict[str, int] = {}
