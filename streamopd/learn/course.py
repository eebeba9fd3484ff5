"""How far a run has come through the stages of its method: by progress, and by what its own steps have shown."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from streamopd.slots import Method

STAGE, VALUES = "course/stage", "course/values"


class Course:
    """`stage` is the least that may hold: those before it ended on a plateau. A function of the figures of past steps, so a replay
    comes to the same."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.stage = 0
        self.watched = 0               # the stage whose plateau is looked for
        self.values: list[float] = []  # of the figure that it looks at, oldest first

    def at(self, progress: float) -> Method:
        """What holds."""
        return self.method.at(progress, self.stage)

    def note(self, progress: float, figures: Mapping[str, float]) -> None:
        """A step at `progress` is done, and these are its figures."""
        if not self.method.stages:
            return
        stage = self.method.stage_at(progress, self.stage)
        if stage != self.watched:
            self.watched, self.values = stage, []
        plateau = self.method.stages[stage].plateau
        if plateau is None or plateau.figure not in figures:
            return
        self.values = [*self.values, figures[plateau.figure]][-2 * plateau.window :]
        if plateau.reached(self.values):
            self.stage = stage + 1

    # ---------------------------------------------------------------- in a checkpoint
    def state(self) -> dict[str, Tensor]:
        return {STAGE: torch.tensor([self.stage, self.watched]), VALUES: torch.tensor(self.values, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` said."""
        (self.stage, self.watched), self.values = state[STAGE].tolist(), state[VALUES].tolist()
