"""Generated tasks: endless questions, drawn one by one from a seed; the held-out ones are never issued."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec
import xxhash

from streamopd.errors import ConfigError

from .question import Question

HELDOUT_STREAM = "heldout"  # the held-out questions' own seed: whatever the run's seed, they stay the same
PATIENCE = 100              # draws for one question that must be new; a task that needs more is nearly used up


class Task(Protocol):
    """Something that draws questions."""

    @property
    def name(self) -> str: ...

    def draw(self, stream: str, index: int) -> Question:
        """Question `index` of the endless stream of that name; a pure function."""


class Drawn:
    """An endless dataset over one task."""

    size: int | None = None  # endless

    def __init__(self, task: Task, seed: int, heldout: list[Question]) -> None:
        self.task = task
        self.seed = seed
        self.heldout = heldout
        self.teacher_ids = frozenset({"default"})
        self._keys = {question.key for question in heldout}

    @property
    def digest(self) -> str:
        """Of the task, its options and a sample of the questions it draws: a generator that changed gives another digest."""
        sample = [self.task.draw("digest", index) for index in range(64)]
        asked = [[msgspec.structs.replace(question, completion=None) for question in some] for some in (sample, self.heldout)]
        return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode([self.task.name, *asked]))

    def question(self, seq: int) -> Question | None:
        """Question `seq`: a pure function of (seed, dataset), never None, never a held-out one."""
        for attempt in range(PATIENCE):
            question = self.task.draw(f"train/{self.seed}/{attempt}", seq)
            if question.key not in self._keys:
                return question
        raise ConfigError(
            f"{PATIENCE} draws of {self.task.name} for question {seq} were all among its {len(self.heldout)} held-out "
            "questions. Lower data.heldout_size, or widen the task in data.options."
        )

    def distinct(self) -> Iterator[Question]:
        """The first questions of the run: a sample to check before it starts."""
        return (question for seq in range(256) if (question := self.question(seq)) is not None)


def draw_heldout(task: Task, size: int) -> list[Question]:
    """`size` distinct questions, the same for every run. ConfigError when the task has too few."""
    found: dict[object, Question] = {}
    for index in range(size * PATIENCE):
        if len(found) == size:
            break
        question = task.draw(HELDOUT_STREAM, index)
        found.setdefault(question.key, question)
    if len(found) < size:
        raise ConfigError(
            f"data.heldout_size = {size}, but {size * PATIENCE:,} draws of {task.name} gave {len(found)} distinct questions. "
            f"Set data.heldout_size to {len(found) // 2} or less, or widen the task in data.options."
        )
    return list(found.values())
