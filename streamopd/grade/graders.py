"""Graders by name: a prompt, the text of its answer, and whether the answer ended by itself, to an Outcome."""

from __future__ import annotations

import json
from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache, partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from streamopd.errors import ConfigError, UserError
from streamopd.extras import from_file, need
from streamopd.schemas import Outcome, Prompt

Grader = Callable[[Prompt, str, bool], Outcome | None]


def names() -> list[str]:
    """What `data.grader` takes, beside "path/to/file.py:NAME"."""
    return sorted(_OPENERS)


def choose(grader: str, train: str) -> str:
    """`data.grader`, or where that is "" the grader that belongs to the task of `data.train`: none for rows of a file."""
    if grader:
        return grader
    task = train.partition(":")[0]
    return task if task in ("chain-sum", "reasoning-gym") else "none"


def load(name: str) -> Grader:
    """The grader called `name`, or the function of a user's own file. ConfigError says what is there instead."""
    if ".py:" in name:
        return partial(_grade_by_own, name, from_file(name, "data.grader"))
    if name not in _OPENERS:
        near = get_close_matches(name, names(), 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(names())}, or a function as FILE.py:NAME."
        raise ConfigError(f"There is no grader {name!r}. {hint}")
    return _OPENERS[name]()


# ---------------------------------------------------------------- the graders
def grade_nothing(prompt: Prompt, text: str, stopped: bool) -> None:
    """No verdict, which is not a reward of 0."""


def grade_chain_sum(prompt: Prompt, text: str, stopped: bool) -> Outcome:
    """The number after the last `=` is the solution, and the answer ended by itself. The prompt ends with `=`."""
    result = (prompt.text + text).rpartition("=")[2]
    feedback = "" if stopped else "the answer did not stop by itself"
    return _verdict(stopped and result == _solution(prompt), feedback)


class JsonAnswer(Struct, forbid_unknown_fields=True):
    """The only reply that "json" rows may have."""

    answer: Annotated[str, Meta(min_length=1)]


def grade_json_answer(prompt: Prompt, text: str, stopped: bool) -> Outcome:
    """By meta["style"]: "json" wants exactly {"answer": "…"} and a stop; "prose" wants anything but a JSON object."""
    style = prompt.meta.get("style", "json")
    if style == "json":
        return _verdict(stopped and _parses(text, JsonAnswer))
    if style == "prose":
        return _verdict(not _parses(text, dict))
    raise UserError(f'{prompt.id} has the style {style!r}; json-answer knows "json" and "prose". Correct the row.')


def grade_math(verify_library: Any, prompt: Prompt, text: str, stopped: bool) -> Outcome:
    """math-verify: the answer's last expression equals the solution's. Its own time limits are off: the pool has one."""
    solution = _solution(prompt)
    wanted = verify_library.parse(solution, parsing_timeout=None)
    if not wanted:
        raise UserError(f"math-verify finds no expression in the solution {solution!r} of {prompt.id}. Correct the row.")
    given = verify_library.parse(text, parsing_timeout=None)
    return _verdict(bool(verify_library.verify(wanted, given, timeout_seconds=None)))


def grade_gym(gym_library: Any, prompt: Prompt, text: str, stopped: bool) -> Outcome:
    """The task's own scorer over what stands in the last <answer> tags, or over the whole text when there are none."""
    if not {"task", "entry"} <= set(prompt.meta):
        raise UserError(f"{prompt.id} is no question of reasoning-gym. Set data.train = reasoning-gym:TASK, or another grader.")
    tagged = gym_library.utils.extract_answer(text)
    answer = text.strip() if tagged is None else tagged
    reward = float(_gym_scorer(gym_library, prompt.meta["task"])(answer, json.loads(prompt.meta["entry"])))
    return Outcome(reward=reward, correct=reward >= 1.0)


def _grade_by_own(name: str, grader: Grader, prompt: Prompt, text: str, stopped: bool) -> Outcome | None:
    """A user's own function, held to the contract."""
    outcome = grader(prompt, text, stopped)
    if outcome is not None and not isinstance(outcome, Outcome):
        raise UserError(f"{name} returned {outcome!r}. A grader returns an Outcome of streamopd.schemas, or None.")
    return outcome


# ---------------------------------------------------------------- opening them
def _open_math() -> Grader:
    return partial(grade_math, need("math_verify", "tasks", "data.grader = math-verify"))


def _open_gym() -> Grader:
    return partial(grade_gym, need("reasoning_gym", "tasks", "data.grader = reasoning-gym"))


_OPENERS: dict[str, Callable[[], Grader]] = {
    "none": lambda: grade_nothing,
    "chain-sum": lambda: grade_chain_sum,
    "json-answer": lambda: grade_json_answer,
    "math-verify": _open_math,
    "reasoning-gym": _open_gym,
}


# ---------------------------------------------------------------- judging
def _verdict(correct: bool, feedback: str = "") -> Outcome:
    return Outcome(reward=float(correct), correct=correct, feedback=feedback)


def _solution(prompt: Prompt) -> str:
    if prompt.solution is None:
        raise UserError(f"{prompt.id} has no solution to compare with. Add a `solution` column, or set data.grader = \"none\".")
    return prompt.solution


def _parses(text: str, kind: type) -> bool:
    try:
        msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return False
    return True


@lru_cache(maxsize=16)
def _gym_scorer(gym_library: Any, task: str) -> Callable[[str, dict[str, Any]], float]:
    return gym_library.get_score_answer_fn(task)
