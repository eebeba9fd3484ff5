"""Randomness that belongs to a request, not to the batch it happens to be in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def uniforms(seed: tuple[int, ...], count: int) -> NDArray[np.float32]:
    """One draw in [0, 1) a token, float32 [count]: a pure function of `seed` (non-negative integers)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).random(count, dtype=np.float32)
