"""Is it better? Held-out figures of one model."""

from __future__ import annotations

from msgspec import Struct


class Evaluation(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """Held-out metrics of the student at `n`, or of a teacher."""

    who: str                         # "student" | "teacher:<id>"
    n: int                           # weights version; 0 for a teacher
    born_s: float
    metrics: dict[str, float]        # accuracy_greedy, accuracy_sampled, kl_heldout, ...
    samples: list[dict[str, str]] = []  # a few of {"prompt", "completion", "correct"}
