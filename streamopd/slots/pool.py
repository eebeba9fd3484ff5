"""Teachers: who is asked about an answer when a run has several."""

from __future__ import annotations

from typing import Literal

from .slot import Slot

OWN_START = "reference"  # the id of the student's initial weights, where no teacher is the reference


class Routed(Slot, frozen=True):
    """The one that the prompt names."""


class Pool(Slot, frozen=True):
    """All of them, as one distribution over the cells that all speak of: "geometric" ∝ Π q_k^w_k, whose reverse KL is the
    weighted sum of theirs (core.md I7), or "arithmetic" Σ w_k q_k, whose forward KL is. Weights by teacher id; () = equal."""

    kind: Literal["geometric", "arithmetic"] = "geometric"
    weights: tuple[tuple[str, float], ...] = ()


Teachers = Routed | Pool
