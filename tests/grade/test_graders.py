from __future__ import annotations

import sys
from pathlib import Path

import pytest

from streamopd.config import Data
from streamopd.errors import ConfigError, UserError
from streamopd.grade.graders import choose, load, names
from streamopd.prompts.chain_sum import work_out
from streamopd.prompts.dataset import open_dataset
from streamopd.schemas import Outcome
from tests.grade.asked import asked

RIGHT, WRONG = Outcome(reward=1.0, correct=True), Outcome(reward=0.0, correct=False)


# ---------------------------------------------------------------- chain-sum
@pytest.mark.parametrize(
    ("answer", "stopped", "correct"),
    [
        ("1+2=3", True, True),
        ("3", True, True),             # the prompt's own `=` comes before it
        ("1+2=3", False, False),       # right so far, but it did not stop
        ("1+2=33", True, False),
        ("1+2=3=4", True, False),
        ("1+2=3+", True, False),
        ("1+2=03", True, False),
        ("1+2= 3", True, False),
        ("1+2=", True, False),
        ("", True, False),
    ],
)
def test_a_chain_sum_is_right_when_its_last_number_is_and_it_stopped(answer: str, stopped: bool, correct: bool) -> None:
    assert load("chain-sum")(asked(), answer, stopped).correct is correct


def test_the_tasks_own_working_is_right_on_every_held_out_question() -> None:
    grade = load("chain-sum")
    for question in open_dataset(Data(train="chain-sum"), 0, 1).heldout:
        assert grade(asked(question.text, question.solution), work_out(question.text), True) == RIGHT


# ---------------------------------------------------------------- json-answer
@pytest.mark.parametrize(
    ("reply", "stopped", "as_json", "as_prose"),
    [
        ('{"answer": "Paris"}', True, RIGHT, WRONG),
        (' {"answer":"Paris"}\n', True, RIGHT, WRONG),
        ('{"answer": "Paris"}', False, WRONG, WRONG),
        ('{"answer": ""}', True, WRONG, WRONG),
        ('{"answer": 4}', True, WRONG, WRONG),
        ('{"answer": "a", "why": "b"}', True, WRONG, WRONG),
        ('{"reply": "a"}', True, WRONG, WRONG),
        ('{"answer": "a"} {"answer": "b"}', True, WRONG, RIGHT),
        ('Sure: {"answer": "a"}', True, WRONG, RIGHT),
        ('["answer", "a"]', True, WRONG, RIGHT),
        ("Paris.", True, WRONG, RIGHT),
        ("", True, WRONG, RIGHT),
        ("[" * 100_000, True, WRONG, RIGHT),
        ("\ud800", True, WRONG, RIGHT),
    ],
)
def test_json_rows_want_one_object_with_an_answer_and_prose_rows_want_none(
    reply: str, stopped: bool, as_json: Outcome, as_prose: Outcome
) -> None:
    grade = load("json-answer")
    assert grade(asked(style="json"), reply, stopped) == as_json
    assert grade(asked(), reply, stopped) == as_json
    assert grade(asked(style="prose"), reply, stopped) == as_prose


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(UserError, match=r"p0 has the style 'poem'"):
        load("json-answer")(asked(style="poem"), "x", True)


# ---------------------------------------------------------------- libraries
@pytest.mark.parametrize(
    ("solution", "answer", "correct"),
    [
        ("1/2", r"so it is $\frac{1}{2}$", True),
        ("1/2", r"The answer is \boxed{0.5}.", True),
        ("42", "It is 41.", False),
        ("$x^2$", "I do not know", False),
    ],
)
def test_math_is_right_when_it_is_equal_however_it_is_written(solution: str, answer: str, correct: bool) -> None:
    assert load("math-verify")(asked(solution=solution), answer, True).correct is correct


def test_a_solution_without_mathematics_is_the_rows_mistake() -> None:
    with pytest.raises(UserError, match=r"finds no expression in the solution 'nothing' of p0"):
        load("math-verify")(asked(solution="nothing"), "1", True)


@pytest.mark.parametrize("shape", ["{}", "I think <answer>0</answer>, no: <answer> {} </answer>"])
def test_a_gym_answer_is_scored_by_the_task_with_or_without_tags(shape: str) -> None:
    data = Data(train="reasoning-gym:chain_sum", heldout_size=4)
    for question in open_dataset(data, 0, 1).heldout:
        prompt = asked(question.text, question.solution, **question.meta)
        assert load("reasoning-gym")(prompt, shape.replace("{}", question.solution or ""), True) == RIGHT
        assert load("reasoning-gym")(prompt, shape.replace("{}", "none"), True).correct is False


def test_a_prompt_that_is_not_of_the_gym_is_refused() -> None:
    with pytest.raises(UserError, match=r"p0 is no question of reasoning-gym"):
        load("reasoning-gym")(asked(), "3", True)


@pytest.mark.parametrize(("name", "package"), [("math-verify", "math_verify"), ("reasoning-gym", "reasoning_gym")])
def test_a_missing_library_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # how Python itself marks a module that cannot be imported
    with pytest.raises(ConfigError, match=rf"data.grader = {name} needs the package {name}.*pip install 'streamopd\[tasks\]'"):
        load(name)


# ---------------------------------------------------------------- by name
def test_without_a_grader_there_is_no_verdict() -> None:
    assert load("none")(asked(), "3", True) is None


@pytest.mark.parametrize("name", ["chain-sum", "math-verify"])
def test_a_row_without_solution_cannot_be_verified(name: str) -> None:
    with pytest.raises(UserError, match=r'p0 has no solution .* data.grader = "none"'):
        load(name)(asked(solution=None), "3", True)


@pytest.mark.parametrize(
    ("grader", "train", "chosen"),
    [
        ("", "chain-sum", "chain-sum"),
        ("", "reasoning-gym:chain_sum", "reasoning-gym"),
        ("", "rows.jsonl", "none"),
        ("", "hf:org/name:test", "none"),
        ("none", "chain-sum", "none"),
        ("mine.py:grade", "chain-sum", "mine.py:grade"),
    ],
)
def test_a_task_brings_its_own_grader_unless_one_is_named(grader: str, train: str, chosen: str) -> None:
    assert choose(grader, train) == chosen


def test_every_name_opens() -> None:
    assert names() == ["chain-sum", "json-answer", "math-verify", "none", "reasoning-gym"]
    assert all(callable(load(name)) for name in names())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("chainsum", "Did you mean 'chain-sum'?"),
        ("xyz", "There are: chain-sum"),
        ("gone.py:grade", "names a file that is not there"),
    ],
)
def test_an_unknown_grader_is_refused_with_what_there_is(name: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(name)
    assert sentence in str(refusal.value)


def test_a_users_own_function_is_held_to_the_contract(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from streamopd.schemas import Outcome\n"
        "def shout(prompt, text, stopped): return Outcome(reward=float(text.isupper()))\n"
        "def number(prompt, text, stopped): return 1.0\n"
    )
    assert load(f"{file}:shout")(asked(), "LOUD", True) == Outcome(reward=1.0)
    with pytest.raises(UserError, match=r"mine\.py:number returned 1\.0\. A grader returns an Outcome"):
        load(f"{file}:number")(asked(), "x", True)
    with pytest.raises(ConfigError, match=r"the file has no 'whisper'. It has: Outcome, shout, number"):
        load(f"{file}:whisper")
