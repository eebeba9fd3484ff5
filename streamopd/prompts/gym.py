"""reasoning-gym tasks as endless streams of questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from random import Random
from typing import Any

from msgspec import Struct

from streamopd.errors import ConfigError
from streamopd.extras import need

from .question import Question

CHUNK = 512  # entries of one library dataset: some tasks make them all at once, and one takes no more than 20,000


class GymTask(Struct, frozen=True):
    """One task of the library under its own options."""

    task: str
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return f"reasoning-gym:{self.task}"

    def draw(self, stream: str, index: int) -> Question:
        """Question `index` of a stream. `meta` holds the whole entry, which the task's own scorer wants back."""
        chunk, place = divmod(index, CHUNK)
        entry = _open(self.task, self.options, f"{stream}/{chunk}")[place]
        answer = entry["answer"]  # None where many answers are right, and only the scorer can tell
        meta = {"task": self.task, "entry": _on_the_wire(entry)}
        return Question(entry["question"], solution=None if answer is None else str(answer), meta=meta)


def open_task(task: str, options: Mapping[str, Any]) -> GymTask:
    """The task called `task`. ConfigError for a name or an option that the library does not know."""
    known = need("reasoning_gym.factory", "tasks", f"data.train = reasoning-gym:{task}").DATASETS
    if task not in known:
        near = get_close_matches(task, known, 3)
        some = f"It has {len(known)}, for example {', '.join(sorted(known)[:8])}."
        hint = f"Did you mean {' or '.join(near)}?" if near else some
        raise ConfigError(f"reasoning-gym has no task {task!r}. {hint}")
    opened = GymTask(task, tuple(sorted(options.items())))
    try:
        dataset = _open(task, opened.options, "options")
    except (TypeError, ValueError, AssertionError) as error:  # how the library refuses options
        raise ConfigError(f"reasoning-gym:{task} refuses data.options {dict(options)}: {error}") from None
    _refuse_unless_scorable(task, dataset)
    return opened


def _refuse_unless_scorable(task: str, dataset: Any) -> None:
    """An entry travels to its scorer as JSON; a scorer that cannot read that would call right answers wrong."""
    entry = dataset[0]
    here = dataset.score_answer(entry["answer"], entry)
    there = dataset.score_answer(entry["answer"], json.loads(_on_the_wire(entry)))
    if here != there:
        raise ConfigError(
            f"The scorer of reasoning-gym:{task} gives the task's own answer {here}, but {there} once the entry has been "
            "JSON (it wants Python objects). Its answers cannot be graded: choose another task, or export questions to a file."
        )


def _on_the_wire(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, default=str)


@lru_cache(maxsize=4)
def _open(task: str, options: tuple[tuple[str, Any], ...], stream: str) -> Any:
    """The library's dataset for a chunk of a stream; its entry i is drawn from its seed + i, so chunks get far seeds."""
    seed = Random(stream).getrandbits(31)
    library = need("reasoning_gym", "tasks", f"reasoning-gym:{task}")
    return library.create_dataset(task, seed=seed, size=CHUNK, **dict(options))
