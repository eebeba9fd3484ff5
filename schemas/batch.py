"""One step's worth of groups. Ages, weights and normalisers are not here: the learner computes them at its step."""

from __future__ import annotations

from msgspec import Struct

from .score import Scored


class Batch(Struct, array_like=True, omit_defaults=True, frozen=True, kw_only=True):
    """Batch n is trained by the learner at n and by no other; it gives weights n + 1."""

    id: str                  # "b<n>"
    run: str
    method: str
    born_s: float
    n: int
    items: list[Scored]      # exactly groups_per_step, but for the last
