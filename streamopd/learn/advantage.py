"""How much better an answer is than the others to the same question. numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamopd.slots import Advantage


def advantages(rewards: NDArray[np.float64], setting: Advantage) -> NDArray[np.float64]:
    """[R] of a group's rewards; one answer alone, and answers that are all equal, have none.

    grpo: (r − mean) / std (arXiv 2402.03300), mean: r − mean, rloo: r − mean of the others (arXiv 2402.14740).
    """
    count = len(rewards)
    centred = rewards - rewards.mean() if count else rewards
    if count < 2 or np.allclose(centred, 0):
        return np.zeros(count)
    if setting.kind == "rloo":
        return centred * count / (count - 1)
    return centred / max(float(rewards.std()), setting.floor) if setting.kind == "grpo" else centred
