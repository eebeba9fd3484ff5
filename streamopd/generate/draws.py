"""Randomness that belongs to a request, not to the batch it happens to be in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TOKENS, REPLACEMENTS, COIN = range(3)  # what draws are for; those for one purpose say nothing of those for another


def uniforms(seed: tuple[int, ...], count: int, purpose: int = TOKENS) -> NDArray[np.float32]:
    """One draw in [0, 1) a token, float32 [count]: a pure function of `seed` (non-negative integers) and `purpose`."""
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose,) if purpose else ())
    return np.random.Generator(np.random.Philox(sequence)).random(count, dtype=np.float32)
