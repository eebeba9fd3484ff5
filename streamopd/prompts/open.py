"""A run's questions, and how they become ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from streamopd.assets import resolve
from streamopd.config import Config, Data
from streamopd.prompts.dataset import Dataset, open_dataset
from streamopd.prompts.render import Renderer
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Turn
from streamopd.slots import Method


def questions_of(config: Config, method: Method, run: str, *, gold: bool = False) -> tuple[Dataset, Renderer]:
    """A run's own questions, for its student and its teachers; `gold`: with the data's answers, where the method asks for them."""
    return open_questions(
        config.data, config.seed, config.passes, resolve(config.student.model),
        {name: teacher.teacher_prompt for name, teacher in config.teachers.items()}, run, method.digest,
        config.generator.max_completion_length if gold and method.needs_gold else 0,
    )


def open_questions(
    data: Data, seed: int, passes: int, student: Path, contexts: Mapping[str, Sequence[Turn]], run: str, method: str,
    max_gold_length: int = 0,
) -> tuple[Dataset, Renderer]:
    """The dataset under `seed`, and the renderer of its questions for `student` and each teacher's own context.

    `max_gold_length` tokens at most have the data's own answers; 0: they are not asked for.
    """
    dataset = open_dataset(data, seed, passes)
    tokenizer = Tokenizer.open(student)
    turns = {teacher_id: list(context) for teacher_id, context in contexts.items()}
    return dataset, Renderer(tokenizer, run, method, turns, data.system_prompt, data.max_prompt_length, max_gold_length)
