"""How old a token is at the step that trains it, and what that costs it. Clock: optimizer steps. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streamopd.errors import GarbageRecord
from streamopd.schemas import Span
from streamopd.slots import AgeDecay, AgeWeight


def token_ages(spans: Sequence[Span], length: int, n: int) -> NDArray[np.int32]:
    """[G] learner version `n` minus the version that wrote each token; GarbageRecord when weights wrote before they existed."""
    starts = np.array([span.start for span in spans] + [length])
    ages = n - np.repeat([span.version for span in spans], np.diff(starts))
    if length and ages.min() < 0:
        raise GarbageRecord(f"Tokens of weights {n - ages.min()} came to step {n}, before those weights exist.")
    return ages.astype(np.int32)


def fresh_mask(ages: NDArray[np.int32], max_age: int) -> NDArray[np.bool_]:
    """[G] the tokens young enough to train."""
    return ages <= max_age


def keep_answer(fresh: NDArray[np.bool_]) -> bool:
    """At least half the answer is fresh. Dropping by the oldest token would starve long answers."""
    return len(fresh) > 0 and 2 * int(fresh.sum()) >= len(fresh)


def age_weights(ages: NDArray[np.int32], setting: AgeWeight) -> NDArray[np.float32]:
    """[T] relative weights of all tokens of a step: their mean is one, so freshness shifts attention, not the step's size."""
    if not isinstance(setting, AgeDecay):
        return np.ones(len(ages), np.float32)
    # counted from the youngest, so that a very old step does not underflow to 0 / 0
    weights = 0.5 ** ((ages - ages.min(initial=0 if not len(ages) else ages[0])) / setting.half_life_steps)
    return (weights / weights.mean()).astype(np.float32)
