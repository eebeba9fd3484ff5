from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamopd.config import Data
from streamopd.errors import ConfigError, UserError
from streamopd.prompts.dataset import Dataset, open_dataset
from streamopd.prompts.question import Question
from streamopd.prompts.rows import Weighted
from streamopd.prompts.table import Table
from streamopd.schemas import Turn


def write(folder: Path, rows: Sequence[Any], name: str = "data.jsonl") -> str:
    file = folder / name
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def open_rows(folder: Path, rows: Sequence[Any], seed: int = 0, passes: int = 1, **data: Any) -> Dataset:
    return open_dataset(Data(train=write(folder, rows), **({"heldout_size": 0} | data)), seed, passes)


def texts(dataset: Dataset, seqs: range) -> list[str]:
    return [dataset.question(seq).text for seq in seqs]


NUMBERED = [{"prompt": f"q{i}"} for i in range(20)]


# ---------------------------------------------------------------- order
def test_every_pass_issues_each_row_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    dataset = open_rows(tmp_path, NUMBERED, passes=2)
    first, second = texts(dataset, range(20)), texts(dataset, range(20, 40))
    assert sorted(first) == sorted(second) == sorted(row["prompt"] for row in NUMBERED)
    assert first != second
    assert dataset.size == 40
    assert dataset.question(40) is None


def test_the_order_is_the_seeds_and_does_not_depend_on_who_asks_first(tmp_path: Path) -> None:
    one, other = open_rows(tmp_path, NUMBERED, seed=3), open_rows(tmp_path, NUMBERED, seed=3)
    assert [one.question(seq) for seq in range(20)] == [other.question(seq) for seq in reversed(range(20))][::-1]
    assert texts(one, range(20)) != texts(open_rows(tmp_path, NUMBERED, seed=4), range(20))


def test_no_passes_means_for_as_long_as_it_is_asked(tmp_path: Path) -> None:
    dataset = open_rows(tmp_path, NUMBERED, passes=0)
    assert dataset.size is None
    assert dataset.question(10**9) is not None


@given(st.lists(st.just(0.0) | st.floats(0.01, 5), min_size=1, max_size=12).filter(any), st.integers(0, 1 << 31))
def test_a_pass_meets_each_row_as_often_as_its_weight_says_give_or_take_one(weights: list[float], seed: int) -> None:
    rows = [Weighted(Question(str(i)), weight) for i, weight in enumerate(weights)]
    table = Table("rows", rows, seed, 1, [])
    met = Counter(table.question(seq).text for seq in range(table.size))
    stretch = table.size / sum(weights)  # a pass is a whole number of questions
    assert table.size == max(1, round(sum(weights)))
    assert all(abs(met[str(i)] - weight * stretch) < 1 + 1e-9 for i, weight in enumerate(weights))
    assert all(weights[int(text)] > 0 for text in met)


# ---------------------------------------------------------------- held out
def test_the_last_rows_are_held_out_and_never_issued_not_even_as_copies(tmp_path: Path) -> None:
    dataset = open_rows(tmp_path, [*NUMBERED[:10], {"prompt": "q19"}, *NUMBERED[10:]], heldout_size=4)
    held = [question.text for question in dataset.heldout]
    assert held == ["q16", "q17", "q18", "q19"]
    assert dataset.size == 16
    assert not set(held) & set(texts(dataset, range(16)))


def test_holding_out_more_than_half_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"heldout_size = 256 of the 20 rows .* Set data.heldout_size to 10 or less"):
        open_rows(tmp_path, NUMBERED, heldout_size=256)


def test_a_held_out_file_is_used_and_leaves_the_training_rows_whole(tmp_path: Path) -> None:
    held = write(tmp_path, [{"prompt": "h0"}, {"prompt": "q3"}, {"prompt": "h2"}], "held.jsonl")
    dataset = open_rows(tmp_path, NUMBERED, heldout=held, heldout_size=2)
    assert [question.text for question in dataset.heldout] == ["h0", "q3"]
    assert sorted(texts(dataset, range(19))) == sorted(row["prompt"] for row in NUMBERED if row["prompt"] != "q3")


def test_a_task_can_be_held_out_against_rows(tmp_path: Path) -> None:
    dataset = open_rows(tmp_path, NUMBERED, heldout="chain-sum", heldout_size=8)
    assert dataset.heldout == open_dataset(Data(train="chain-sum", heldout_size=8), 5, 1).heldout


def test_rows_that_are_all_held_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 20 rows, and each of them is held out or has weight 0"):
        open_rows(tmp_path, NUMBERED, heldout=write(tmp_path, NUMBERED, "same.jsonl"), heldout_size=20)


# ---------------------------------------------------------------- what a row says
def test_columns_become_a_question_and_the_others_its_meta(tmp_path: Path) -> None:
    row = {"prompt": "2+2?", "solution": 4, "teacher_id": "math", "weight": 1, "style": "json", "tags": ["a"], "none": None}
    dataset = open_rows(tmp_path, [row])
    assert dataset.question(0) == Question(
        text="2+2?", solution="4", teacher_id="math", meta={"style": "json", "tags": '["a"]'}
    )
    assert dataset.teacher_ids == {"math"}


def test_a_conversation_ends_before_somebody_elses_answer(tmp_path: Path) -> None:
    said = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Bye!")]
    dataset = open_rows(tmp_path, [{"messages": [{"role": role, "content": content} for role, content in said]}])
    question = dataset.question(0)
    assert question.messages == tuple(Turn(*turn) for turn in said[:4])
    assert question.text == "Bye"


HI = [{"role": "user", "content": "Hi"}]
HELLO = [{"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("row", "completion"),
    [
        ({"prompt": "2+2=", "completion": "4"}, "4"),
        ({"prompt": "2+2=", "completion": [{"role": "assistant", "content": "4"}]}, "4"),  # TRL's form of conversations
        ({"messages": [*HI, *HELLO]}, "Hello"),
        ({"messages": [*HI, *HELLO], "completion": "Good day"}, "Good day"),  # the column is more particular
        ({"messages": HI}, None),
        ({"prompt": "2+2=", "completion": None}, None),
        ({"prompt": "2+2=", "completion": ""}, None),
        ({"prompt": "2+2=", "completion": 4}, None),  # no answer to learn from; most runs do not ask for one
        ({"prompt": "2+2=", "completion": [*HI, *HELLO]}, None),
        ({"prompt": "2+2=", "completion": HI}, None),
    ],
)
def test_a_rows_own_answer_is_its_completion_or_what_the_assistant_says_last(
    tmp_path: Path, row: dict[str, Any], completion: str | None
) -> None:
    question = open_rows(tmp_path, [row]).question(0)
    assert question.completion == completion
    assert ("completion" in question.meta) == (row.get("completion") is not None), "a grader may read it too"
    assert question.messages in ((), (Turn("user", "Hi"),))


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    dataset = open_rows(tmp_path, [{"problem": "2+2", "answer": "4"}], options={"prompt": "problem", "solution": "answer"})
    assert dataset.question(0) == Question(text="2+2", solution="4")


def test_blank_lines_are_not_rows(tmp_path: Path) -> None:
    assert open_rows(tmp_path, ['{"prompt": "a"}\n', "\n", "  \n", '{"prompt": "b"}']).size == 2


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "has no rows"),
        (["\n"], "has no rows"),
        ([{"prompt": "a"}, "{]\n"], "data.jsonl, line 2 is not JSON"),
        ([{"prompt": "a"}, "\n", "[1]\n"], "data.jsonl, line 3 is a JSON list, not an object"),
        ([{"question": "a", "answer": "b"}], "line 1 has neither a column 'prompt' nor 'messages'; it has question, answer"),
        ([{"prompt": ["a"]}], "prompt is ['a'], not a text"),
        ([{"prompt": ""}], "prompt is '', not a text"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "line 1 has neither a column"),
        ([{"messages": [{"role": "system", "content": "a"}]}], "no message has the role user"),
        ([{"messages": "hello"}], "messages is 'hello', not a list of {role, content}"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "role 'user' has the content"),
        ([{"prompt": "a", "weight": -1}], "weight is -1"),
        ([{"prompt": "a", "weight": "much"}], "weight is 'much'"),
        ([{"prompt": "a", "weight": 0}], "held out or has weight 0"),
    ],
)
def test_a_wrong_row_is_refused_with_its_place(tmp_path: Path, rows: list[Any], sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        open_rows(tmp_path, rows)
    assert sentence in str(refusal.value)


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl, line 2 is not JSON in UTF-8"):
        open_dataset(Data(train=str(tmp_path / "latin.jsonl"), heldout_size=0), 0, 1)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.parquet"])
def test_a_missing_file_is_told_with_the_place_where_it_was_looked_for(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"There is no data file at .*{name}"):
        open_dataset(Data(train=str(tmp_path / name)), 0, 1)


def test_an_option_that_files_do_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name its columns \(prompt, messages, .*min_terms"):
        open_rows(tmp_path, NUMBERED, options={"min_terms": 3})


@pytest.mark.parametrize(("package", "train"), [("pyarrow", "a.parquet"), ("datasets", "hf:org/name:test")])
def test_formats_of_an_extra_are_told_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, train: str
) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # how Python itself marks a module that cannot be imported
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(ConfigError, match=rf"package {package}.*pip install 'streamopd\[data\]'"):
        open_dataset(Data(train=train), 0, 1)


# ---------------------------------------------------------------- digest
def test_the_digest_changes_with_any_row_weight_or_order_and_not_with_the_run(tmp_path: Path) -> None:
    def digest(rows: list[dict[str, Any]], seed: int = 0, **data: Any) -> str:
        return open_rows(tmp_path, rows, seed=seed, **data).digest

    same = digest(NUMBERED)
    assert digest(NUMBERED, seed=9) == same
    assert digest([*NUMBERED[:-1], {"prompt": "q19 "}]) != same
    assert digest([*NUMBERED[:-1], {"prompt": "q19", "weight": 2}]) != same
    assert digest([*NUMBERED[:-1], {"prompt": "q19", "solution": "x"}]) != same
    assert digest([*NUMBERED[:-1], {"prompt": "q19", "completion": "x"}]) != same
    assert digest(NUMBERED[::-1]) != same
    assert digest(NUMBERED, heldout_size=1) != same
