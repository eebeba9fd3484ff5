"""Rows of a file or of a hub dataset, made into questions; whatever is wrong with one is told with its number."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from streamopd.errors import ConfigError, UserError
from streamopd.extras import need
from streamopd.schemas import Turn

from .question import Question

HUB = "hf:"
FILES = (".jsonl", ".parquet")
Row = tuple[str, dict[str, Any]]  # where it stands, for people; its columns


class Columns(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`data.options` of a file: what its columns are called, and the subset of a hub dataset."""

    prompt: str = "prompt"
    messages: str = "messages"
    completion: str = "completion"
    solution: str = "solution"
    teacher_id: str = "teacher_id"
    weight: str = "weight"
    subset: str = ""


class Weighted(Struct, frozen=True):
    """A question and how often a pass issues it."""

    question: Question
    weight: float = 1.0


def is_table(source: str) -> bool:
    """Does `source` name rows, rather than a task?"""
    return source.startswith(HUB) or source.endswith(FILES)


def read(source: str, options: Mapping[str, Any]) -> list[Weighted]:
    """Every question of `source`. UserError: no such file, a bad line, a missing column, no rows."""
    columns = _columns(options)
    questions = [_to_question(where, row, columns) for where, row in _rows(source, columns)]
    if not questions:
        raise UserError(f"{source} has no rows. data.train and data.heldout need at least one question each.")
    return questions


def _columns(options: Mapping[str, Any]) -> Columns:
    try:
        return msgspec.convert(dict(options), Columns)
    except msgspec.ValidationError as error:
        known = ", ".join(Columns.__struct_fields__)
        raise ConfigError(f"data.options of a file name its columns ({known}): {error}.") from None


# ---------------------------------------------------------------- reading
def _rows(source: str, columns: Columns) -> Iterator[Row]:
    if source.startswith(HUB):
        return _hub_rows(source.removeprefix(HUB), columns.subset)
    file = Path(source).expanduser()
    if not file.is_file():
        raise UserError(f"There is no data file at {file.absolute()}. Correct data.train or data.heldout ({source}).")
    return _jsonl_rows(file) if file.suffix == ".jsonl" else _parquet_rows(file)


def _jsonl_rows(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file}, line {number}"
                yield where, _json_object(line, where)


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON in UTF-8: {error}. A .jsonl file holds one object a line.") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is a JSON {type(row).__name__}, not an object. A .jsonl file holds one object a line.")
    return row


def _parquet_rows(file: Path) -> Iterator[Row]:
    parquet = need("pyarrow.parquet", "data", str(file))
    try:
        table = parquet.read_table(file)
    except (ValueError, OSError) as error:  # what pyarrow's own errors are
        raise UserError(f"{file} cannot be read as parquet: {error}. Write it again, or use .jsonl.") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{file}, row {number}", row


def _hub_rows(name: str, subset: str) -> Iterator[Row]:
    path, _, split = name.partition(":")
    datasets = need("datasets", "data", HUB + name)
    try:
        loaded = datasets.load_dataset(path, subset or None, split=split or "train")
    except (ValueError, OSError) as error:  # no such dataset, subset or split; no network
        raise UserError(
            f"{HUB}{name} cannot be loaded: {error} Correct it (hf:ORG/NAME:SPLIT, and data.options = {{subset = \"…\"}} "
            "where it has several), or save its rows as .jsonl."
        ) from None
    for number, row in enumerate(loaded, 1):
        yield f"{HUB}{name}, row {number}", row


# ---------------------------------------------------------------- one row
def _to_question(where: str, row: Mapping[str, Any], columns: Columns) -> Weighted:
    """Columns without a meaning of their own become `meta`, for graders."""
    messages, answer = _split(_turns(where, row.get(columns.messages)))
    used = {columns.prompt, columns.messages, columns.solution, columns.teacher_id, columns.weight}
    solution = row.get(columns.solution)
    question = Question(
        text=_last_question(where, messages) if messages else _prompt(where, row, columns),
        solution=None if solution is None else _as_text(solution),
        teacher_id=str(row.get(columns.teacher_id) or "default"),
        meta={key: _as_text(value) for key, value in row.items() if key not in used and value is not None},
        messages=messages,
        completion=_completion(row.get(columns.completion)) or answer,
    )
    return Weighted(question, _weight(where, row.get(columns.weight)))


def _prompt(where: str, row: Mapping[str, Any], columns: Columns) -> str:
    text = row.get(columns.prompt)
    if text is None:
        raise UserError(
            f"{where} has neither a column {columns.prompt!r} nor {columns.messages!r}; it has {', '.join(row) or 'none'}. "
            'Rename a column, or say which one it is: data.options = {prompt = "…"}.'
        )
    if not isinstance(text, str) or not text:
        raise UserError(
            f"{where}: {columns.prompt} is {_shorten(text)}, not a text. A conversation goes into {columns.messages!r}."
        )
    return text


def _completion(value: Any) -> str | None:
    """The row's own answer: a text, or as TRL has it of conversations, one turn of an assistant. None: it has none.

    Whatever else stands there is no error: most runs do not ask for it.
    """
    match value:
        case str(text) | [{"role": "assistant", "content": str(text)}]:
            return text or None
    return None


def _split(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], str | None]:
    """The turns up to the question, and the answer where a last assistant turn is one."""
    if turns and turns[-1].role == "assistant":
        return tuple(turns[:-1]), turns[-1].content or None
    return tuple(turns), None


def _turns(where: str, value: Any) -> list[Turn]:
    if value is None:
        return []
    try:
        turns = [Turn(turn["role"], turn["content"]) for turn in value]
    except (TypeError, KeyError):
        raise UserError(f"{where}: messages is {_shorten(value)}, not a list of {{role, content}}.") from None
    for turn in turns:
        if not isinstance(turn.role, str) or not isinstance(turn.content, str):
            raise UserError(f"{where}: a message of role {turn.role!r} has the content {_shorten(turn.content)}, not a text.")
    return turns


def _last_question(where: str, messages: Iterable[Turn]) -> str:
    asked = [turn.content for turn in messages if turn.role == "user"]
    if not asked:
        raise UserError(f"{where}: no message has the role user, so nothing is asked.")
    return asked[-1]


def _weight(where: str, value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise UserError(f"{where}: weight is {_shorten(value)}. It says how often a pass issues the row: a number, 0 or more.")
    return float(value)


def _as_text(value: Any) -> str:
    """Text as it is; anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
