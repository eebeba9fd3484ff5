"""Datasets by name: an endless task, or finite rows. seq -> question is a pure function of (seed, dataset)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Protocol

import msgspec

from streamopd.config import Data
from streamopd.errors import ConfigError

from . import gym, rows
from .chain_sum import ChainSum
from .drawn import Drawn, Task, draw_heldout
from .question import Question
from .table import Table, hold_out_last

GYM = "reasoning-gym:"
FORMS = f"chain-sum, {GYM}TASK, FILE.jsonl, FILE.parquet, hf:ORG/NAME[:SPLIT]"

__all__ = ["Dataset", "Question", "open_dataset"]


class Dataset(Protocol):
    """Where a run's questions come from."""

    heldout: list[Question]      # fixed: no run's seed changes them, and none of them is ever issued
    size: int | None             # questions until the data ends; None: endless

    @property
    def teacher_ids(self) -> frozenset[str]: ...

    @property
    def digest(self) -> str:
        """Of the contents: a checkpoint with another one refuses to resume."""

    def question(self, seq: int) -> Question | None:
        """Question `seq`, from 0; None when the data is exhausted."""

    def distinct(self) -> Iterator[Question]:
        """What may be issued, once each (of an endless task a sample): for checks before the run."""


def open_dataset(data: Data, seed: int, passes: int) -> Dataset:
    """The dataset that `data` names. `passes` over finite data, 0 for endless; tasks have no passes."""
    if rows.is_table(data.train):
        train, heldout = _train_and_heldout(data)
        return Table(data.train, train, seed, passes, heldout)
    task = _open_task(data.train, data.options)
    return Drawn(task, seed, _named_heldout(data) if data.heldout else draw_heldout(task, data.heldout_size))


def _train_and_heldout(data: Data) -> tuple[list[rows.Weighted], list[Question]]:
    train = rows.read(data.train, data.options)
    if data.heldout:
        return train, _named_heldout(data)
    return hold_out_last(data.train, train, data.heldout_size)


def _named_heldout(data: Data) -> list[Question]:
    """The first `heldout_size` questions of data.heldout; `data.options` are for it too when it is of the same task."""
    options = data.options if _kind(data.heldout) == _kind(data.train) else {}
    if rows.is_table(data.heldout):
        return [row.question for row in rows.read(data.heldout, options)][: data.heldout_size]
    return draw_heldout(_open_task(data.heldout, options), data.heldout_size)


def _kind(source: str) -> str:
    return "table" if rows.is_table(source) else source


def _open_task(name: str, options: Mapping[str, Any]) -> Task:
    if name.startswith(GYM):
        return gym.open_task(name.removeprefix(GYM), options)
    if name != ChainSum.name:
        near = get_close_matches(name, (ChainSum.name, GYM), 1, cutoff=0.5)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(f"There is no dataset {name!r}. {hint}The forms are: {FORMS}.")
    return _chain_sum(options)


def _chain_sum(options: Mapping[str, Any]) -> ChainSum:
    for key in options:
        if key not in ChainSum.__struct_fields__:
            raise ConfigError(f"chain-sum has no option {key!r}. It has: {', '.join(ChainSum.__struct_fields__)}.")
    try:
        return msgspec.convert(dict(options), ChainSum)
    except msgspec.ValidationError as error:
        raise ConfigError(f"data.options of chain-sum: {error}.") from None
