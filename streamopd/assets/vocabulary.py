"""Ids travel between student and teacher as they are, so both must mean the same tokens by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from streamopd.errors import ConfigError


def vocabulary_problem(student_folder: Path, teacher_folder: Path, whole: bool) -> str | None:
    """The sentence that says how the two vocabularies differ; None when ids mean the same in both.

    The tables of ids are compared when both folders have a tokenizer.json; the sizes of config.json when they have not, and
    when a method compares `whole` distributions. Else a head may be padded wider than its tokenizer.
    """
    folders = (student_folder, teacher_folder)
    student_size, teacher_size = (vocab_size(folder) for folder in folders)
    tables = all((folder / "tokenizer.json").is_file() for folder in folders)
    if None not in (student_size, teacher_size) and student_size != teacher_size and (whole or not tables):
        return _sentence(*folders, f"vocab_size is {student_size} in the first and {teacher_size} in the second")
    if not tables:
        return None
    student, teacher = (tokens(folder) for folder in folders)
    differing = sorted(i for i in student.keys() | teacher.keys() if student.get(i) != teacher.get(i))
    if not differing:
        return None
    first = differing[0]
    return _sentence(
        *folders, f"{len(differing)} ids differ, the first is {first}: {_told(student, first)} in the first and "
        f"{_told(teacher, first)} in the second",
    )


def _sentence(student: Path, teacher: Path, difference: str) -> str:
    return (
        f"The student {student} and the teacher {teacher} do not share a vocabulary: {difference}. "
        "Name a teacher that has the student's tokenizer."
    )


def _told(tokens: dict[int, str], index: int) -> str:
    return repr(tokens[index]) if index in tokens else "no token"


def vocab_size(folder: Path) -> int | None:
    """Of config.json; where a model of several parts has one for text, of that part. None: it does not say."""
    config = _read(folder / "config.json")
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return None if size is None else int(size)


def tokens(folder: Path) -> dict[int, str]:
    """Id -> token of its tokenizer.json, added ones included."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if "model" not in _read(file):  # the library's own complaint is a bare Exception
        raise ConfigError(f"{file} is JSON but no tokenizer: it has no `model`. Copy it again from the model's source.")
    table = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    return {index: token for token, index in table.items()}


def texts(folder: Path) -> dict[int, str]:
    """Id -> what it decodes to alone."""
    from tokenizers import Tokenizer

    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {index: core.decode([index], skip_special_tokens=False) for index in tokens(folder)}


def _read(file: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}. Copy it again from the model's source.") from None
    return value
