"""Append-only JSON lines: one write a line, so a kill tears at most the line it interrupts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from streamopd.schemas import Array, Evidence, Rollout, Scored

Decode = Callable[[list[int]], str]


class Journal:
    """A growing file of JSON lines. Several processes may append to one file: O_APPEND keeps their lines whole."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._end_torn_line()

    def write(self, record: Any) -> None:
        """Append `record` (a Struct, or anything JSON takes; NaN becomes null) as one line."""
        line = memoryview(_encode(record) + b"\n")
        while line:  # a short write means a full disk: the next one says so
            line = line[os.write(self._file, line) :]

    def close(self) -> None:
        os.close(self._file)

    def _end_torn_line(self) -> None:
        """A line that an earlier life could not finish must not swallow the first one of this life."""
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of `path`, oldest first; torn ones are left out, a missing file has none."""
    file = Path(path)
    if not file.is_file():
        return []
    lines = (_parse(line) for line in file.read_bytes().split(b"\n"))
    return [line for line in lines if line is not None]


def rewind(path: str | Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Drop the lines that `keep` refuses, all or nothing; how many were dropped. Call it before opening a Journal there.

    A learner that restarts from its checkpoint will write the later lines again.
    """
    lines = read(path)
    kept = [line for line in lines if keep(line)]
    if len(kept) < len(lines):
        write_atomically(Path(path), b"".join(_encode(line) + b"\n" for line in kept))
    return len(lines) - len(kept)


class SampleLog:
    """Every `every`-th group by seq, one line a rollout; a replayed step adds nothing."""

    def __init__(self, path: str | Path, every: int = 20, decode: Decode | None = None) -> None:
        self.every = every
        self.decode = decode
        self._written = {(line["seq"], line["attempt"], line["rollout"]) for line in read(path)}
        self._journal = Journal(path)

    def write(self, scored: Scored, attempt: str, fate: str, n: int) -> None:
        """`fate` as the record has it ("trained", "filtered:truncated"), at step `n`."""
        seq = scored.group.prompt.seq
        if seq % self.every:
            return
        for index, rollout in enumerate(scored.group.rollouts):
            key = (seq, attempt, rollout.id)
            if key not in self._written:
                self._written.add(key)
                views = scored.views[index] if index < len(scored.views) else []
                facts = {"seq": seq, "attempt": attempt, "rollout": rollout.id, "fate": fate, "n": n}
                self._journal.write(facts | self._line(scored, rollout, views))

    def close(self) -> None:
        self._journal.close()

    def _line(self, scored: Scored, rollout: Rollout, views: list[Evidence]) -> dict[str, Any]:
        completion_ids = rollout.completion_ids.numpy().tolist()
        outcome = rollout.outcome
        return {
            "group_id": scored.group.id,
            "prompt": scored.group.prompt.text,
            "completion": self.decode(completion_ids) if self.decode else None,
            "prompt_ids": rollout.prompt_ids.numpy().tolist(),
            "completion_ids": completion_ids,
            "logprobs": _rounded(rollout.logprobs),
            "teacher_logprobs": _rounded(views[0].logprobs) if views else None,
            "weight_spans": [[span.start, span.version, span.kv] for span in rollout.weight_spans],
            "authors": [[author.start, author.who] for author in rollout.authors],
            "grade": {"reward": outcome.reward, "correct": outcome.correct} if outcome else None,
            "finish": rollout.finish.value,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
        }


def write_atomically(file: Path, body: bytes) -> None:
    """A reader of `file` sees all of the old content or all of `body`."""
    beside = file.with_name(file.name + ".new")
    beside.write_bytes(body)
    beside.replace(file)


def _rounded(logprobs: Array) -> list[float]:
    """Log-probs to 5 decimals: a third of the bytes, and nobody reads more."""
    rounded: list[float] = logprobs.numpy().astype(np.float64).round(5).tolist()
    return rounded


def _encode(record: Any) -> bytes:
    return msgspec.json.encode(record, enc_hook=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be a JSON value")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return None
    return record if isinstance(record, dict) else None
