"""What every setting is, and scalars that move during a run."""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, inf, log, pi
from typing import ClassVar, TypeVar

import msgspec
from msgspec import Struct

AnySlot = TypeVar("AnySlot", bound="Slot")


class Slot(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A setting of one primitive, named by its class."""

    facts: ClassVar[tuple[str, ...]] = ()  # what the learner must know of a token for it; see learn/objective/facts.py
    surveys: ClassVar[bool] = False        # whether it must have seen the whole step before it can say anything of one token


# ---------------------------------------------------------------- scalars; progress = steps done / learn.max_steps, in [0, 1]
def require_progress(until: float) -> None:
    if not 0 < until <= 1:
        raise ValueError(f"`until` is a progress of the run, in (0, 1]; this one is {until}.")


class Moving(Slot, frozen=True):
    """A number that depends on the progress of the run."""

    def at(self, progress: float) -> float:
        raise NotImplementedError


class Linear(Moving, frozen=True):
    """From `start` to `end`, reached at progress `until`."""

    start: float
    end: float
    until: float = 1.0

    def __post_init__(self) -> None:
        require_progress(self.until)

    def at(self, progress: float) -> float:
        return self.start + (self.end - self.start) * min(1.0, progress / self.until)


class Cosine(Moving, frozen=True):
    """From `start` to `end` along half a cosine, reached at progress `until`."""

    start: float
    end: float
    until: float = 1.0

    def __post_init__(self) -> None:
        require_progress(self.until)

    def at(self, progress: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + cos(pi * min(1.0, progress / self.until)))


class Cliff(Moving, frozen=True):
    """`value`, but never beyond the extrapolation that would empty structure tokens (core.md D7, our reconstruction of
    arXiv 2605.08737): λ* = 1 + log c / log((1 − b) / (1 − m)), m the teacher's modal mass, b the start's, c the ratio's clip."""

    value: float = 1.25
    teacher_mass: float = 0.999
    start_mass: float = 0.9
    clip: float = 5.0

    def __post_init__(self) -> None:
        if not (0 < self.teacher_mass < 1 and 0 < self.start_mass < 1 and self.clip > 1):
            raise ValueError(f"A cliff has masses between 0 and 1 and a clip above 1; this one is {self}.")

    @property
    def highest(self) -> float:
        """λ*; infinite where the start is as sure as its teacher: nothing is emptied then."""
        if self.start_mass >= self.teacher_mass:
            return inf
        return 1 + log(self.clip) / log((1 - self.start_mass) / (1 - self.teacher_mass))

    def at(self, progress: float) -> float:
        return min(self.value, self.highest)


def progress_of(steps: int, max_steps: int) -> float:
    """How far a run is after so many steps: 0 at its first step, 1 at its last; 0 when its end is not known."""
    return min(1.0, steps / max(1, max_steps - 1)) if max_steps else 0.0


Scalar = float | Linear | Cosine | Cliff


def settled(slot: AnySlot, progress: float) -> AnySlot:
    """`slot` with every moving number, its own and those of slots inside it, at what it is at `progress`."""
    found = {name: _settle(getattr(slot, name), progress) for name in slot.__struct_fields__}
    return msgspec.structs.replace(slot, **found)


def _settle(value: object, progress: float) -> object:
    if isinstance(value, Moving):
        return value.at(progress)
    if isinstance(value, Slot):
        return settled(value, progress)
    return tuple(_settle(part, progress) for part in value) if isinstance(value, tuple) else value


def inside(slot: Slot) -> Sequence[Slot]:
    """`slot` and every slot in it."""
    found = [slot]
    for name in slot.__struct_fields__:
        value = getattr(slot, name)
        for part in value if isinstance(value, tuple) else (value,):
            found += inside(part) if isinstance(part, Slot) else []
    return found
