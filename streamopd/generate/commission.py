"""A prompt commissions its answers: who is to write each, and how much. Without torch: what a run refuses is known before it starts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from streamopd.config import Teacher
from streamopd.errors import ConfigError
from streamopd.schemas import Array, Prompt
from streamopd.slots import (
    Behaviour,
    Coin,
    GeometricBlend,
    Members,
    Method,
    Mixture,
    OnPolicy,
    TeacherPrefix,
    Until,
)
from streamopd.slots.slot import Scalar

from .draws import COIN, uniforms
from .engine import Request


def commission(prompt: Prompt, behaviour: Behaviour, *, count: int, run_seed: int, max_new: int) -> list[Request]:
    """Requests for the `count` answers to `prompt`, of at most `max_new` tokens, under the behaviour that holds now.

    An answer keeps what it was begun under, whatever is swapped in before it ends.
    """
    ids, context, gold = (_ids(array) for array in (prompt.prompt_ids, prompt.teacher_prompt_ids, prompt.gold_ids))
    assert ids is not None
    requests = []
    for index in range(count):
        seed = (run_seed, prompt.seq, index)
        own = of_answer(behaviour, seed, index, count)
        written = gold if own.author == "gold" else None
        requests.append(Request(
            id=f"{prompt.id}.{index}", prompt_ids=ids, seed=seed, behaviour=own, teacher_prompt_ids=context, gold_ids=written,
            max_new=horizon(behaviour, max_new) if written is None else len(written),
        ))
    return requests


def horizon(behaviour: Behaviour, max_new: int) -> int:
    """Tokens that an answer may have, at least 1 (ESR, arXiv 2605.27028)."""
    return min(max_new, max(1, round(plain(behaviour.tokens)))) if isinstance(behaviour, Until) else max_new


def of_answer(behaviour: Behaviour, seed: tuple[int, ...], index: int, count: int) -> Behaviour:
    """What answer `index` of `count` is written under: `Coin(student=0)`, a coin thrown, is its author's whole answer.

    A behaviour that has moved to where it adds nothing is OnPolicy: no teacher is asked any more.
    """
    match behaviour:
        case Until() | Mixture(alpha=0) | GeometricBlend(epsilon=0):
            return OnPolicy()
        case TeacherPrefix() if round(plain(behaviour.tokens)) < 1:
            return OnPolicy()
        case Coin():
            to_student = uniforms(seed, 1, COIN)[0] < plain(behaviour.student)
            return OnPolicy() if to_student else Coin(student=0.0, greedy=behaviour.greedy, author=behaviour.author)
        case Members():
            return OnPolicy() if index < count - behaviour.count else Coin(student=0.0, author=behaviour.author)
    return behaviour


def _ids(array: Array | None) -> NDArray[np.int32] | None:
    return None if array is None else np.asarray(array.numpy())


def plain(number: Scalar) -> float:
    """A setting's number, which `Method.at` has settled."""
    assert isinstance(number, int | float), f"{number} moves; ask the method for what holds now"
    return float(number)


def writing_teacher(method: Method, engine: str, temperature: float, teachers: Mapping[str, Teacher]) -> str:
    """The id of the teacher that sits in the generator, "" when the method writes without one; ConfigError when it cannot sit there."""
    if not method.needs_writing_teacher:
        return ""
    names = " and ".join(sorted({type(behaviour).__name__ for behaviour in method.behaviours if behaviour.author == "teacher"}))
    wish = f'method = "{method.name}" writes with a teacher inside the generator (behaviour {names})'
    if engine != "hf":
        raise ConfigError(f'{wish}, but generator.engine = "{engine}" has no place for one. Set it to "hf".')
    if temperature == 0:
        raise ConfigError(f"{wish} and draws from both, but generator.temperature = 0 draws nothing. Raise it.")
    teachers = {name: teacher for name, teacher in teachers.items() if teacher.role == "teacher"}
    if len(teachers) != 1:
        raise ConfigError(
            f"{wish}, and has place for one, but the run has {len(teachers)}: {', '.join(sorted(teachers))}. Leave one of them, "
            "or choose a method whose student writes alone."
        )
    ((teacher_id, teacher),) = teachers.items()
    if teacher.urls:
        raise ConfigError(
            f"{wish}, but teachers.{teacher_id} is reached by url ({', '.join(teacher.urls)}), which is too far for every token. "
            f"Give teachers.{teacher_id}.model a folder and leave url out, or choose a method whose student writes alone."
        )
    return teacher_id
