"""How far a run has come through the stages of its method: by progress, and by what its own steps have shown."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from streamopd.slots import Method

STAGE, VALUES = "course/stage", "course/values"


class Course:
    """`stage` is the least that holds at the next step. A function of the figures of past steps, so a replay comes to the same."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.stage = 0
        self.values: list[float] = []  # of the figure that the stage's plateau looks at, oldest first

    def at(self, progress: float) -> Method:
        """What holds."""
        return self.method.at(progress, self.stage)

    def note(self, progress: float, figures: Mapping[str, float]) -> None:
        """A step at `progress` is done, and these are its figures."""
        if not self.method.stages:
            return
        self._enter(self.method.stage_at(progress, self.stage))
        plateau = self.method.stages[self.stage].plateau
        if plateau is None or plateau.figure not in figures:
            return
        self.values = [*self.values, figures[plateau.figure]][-2 * plateau.window :]
        if plateau.reached(self.values):
            self._enter(self.stage + 1)

    def _enter(self, stage: int) -> None:
        if stage != self.stage:
            self.stage, self.values = stage, []

    # ---------------------------------------------------------------- in a checkpoint
    def state(self) -> dict[str, Tensor]:
        return {STAGE: torch.tensor(self.stage), VALUES: torch.tensor(self.values, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` said."""
        self.stage, self.values = int(state[STAGE]), state[VALUES].tolist()
