"""Two models share a vocabulary, or the sentence says where they differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from streamopd.assets import resolve
from streamopd.assets.vocabulary import vocabulary_problem
from streamopd.errors import ConfigError

STUDENT, TEACHER = resolve("asset:quickstart-student"), resolve("asset:quickstart-teacher")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A copy of the teacher's folder without its weights, to be changed."""
    return Path(shutil.copytree(TEACHER, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors")))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rename_tokens(folder: Path, names: dict[str, str]) -> None:
    """The same ids under other names."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {names.get(token, token): index for token, index in vocabulary.items()}
    file.write_text(json.dumps(tokenizer))


def test_the_models_of_the_quickstart_share_their_vocabulary() -> None:
    assert vocabulary_problem(STUDENT, TEACHER, whole=True) is None


def test_another_size_is_told_with_both_values(other: Path) -> None:
    change(other / "config.json", vocab_size=300)
    told = vocabulary_problem(STUDENT, other, whole=True)
    assert told is not None
    assert "vocab_size is 19 in the first and 300 in the second" in told
    assert str(STUDENT) in told
    assert str(other) in told


def test_a_head_padded_wider_than_its_tokenizer_is_fine_for_a_support_of_ids(other: Path) -> None:
    change(other / "config.json", vocab_size=300)
    assert vocabulary_problem(STUDENT, other, whole=False) is None
    (other / "tokenizer.json").unlink()
    assert "19 in the first and 300 in the second" in (vocabulary_problem(STUDENT, other, whole=False) or "")


def test_the_size_of_the_part_that_reads_text_counts(other: Path) -> None:
    config = json.loads((other / "config.json").read_text())
    del config["vocab_size"]
    (other / "config.json").write_text(json.dumps(config | {"text_config": {"vocab_size": 20}}))
    assert "19 in the first and 20 in the second" in (vocabulary_problem(STUDENT, other, whole=True) or "")


def test_swapped_tokens_are_counted_and_the_first_is_named(other: Path) -> None:
    rename_tokens(other, {"3": "4", "4": "3"})
    ids = json.loads((TEACHER / "tokenizer.json").read_text())["model"]["vocab"]
    told = vocabulary_problem(STUDENT, other, whole=True)
    assert told is not None
    assert f"2 ids differ, the first is {ids['3']}: '3' in the first and '4' in the second" in told


def test_an_added_token_is_a_difference_even_where_the_sizes_agree(other: Path) -> None:
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    added = tokenizer["added_tokens"][0] | {"id": 19, "content": "<more>"}
    change(other / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], added])
    assert "1 ids differ, the first is 19: no token in the first and '<more>' in the second" in (
        vocabulary_problem(STUDENT, other, whole=True) or ""
    )


def test_without_a_tokenizer_only_the_sizes_are_compared(other: Path) -> None:
    rename_tokens(other, {"3": "4", "4": "3"})
    (other / "tokenizer.json").unlink()
    assert vocabulary_problem(STUDENT, other, whole=True) is None


@pytest.mark.parametrize(("body", "sentence"), [("{}", "no tokenizer: it has no `model`"), ("{", "is not JSON")])
def test_a_broken_tokenizer_is_the_users_to_mend(other: Path, body: str, sentence: str) -> None:
    (other / "tokenizer.json").write_text(body)
    with pytest.raises(ConfigError, match=sentence):
        vocabulary_problem(STUDENT, other, whole=True)
