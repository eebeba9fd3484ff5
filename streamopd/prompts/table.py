"""Finite data: seq -> (pass, index) by a permutation of each pass's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from streamopd.errors import ConfigError

from .question import Question
from .rows import Weighted


class Table:
    """A dataset over rows. `passes` 0 goes round for as long as it is asked."""

    def __init__(self, source: str, rows: Sequence[Weighted], seed: int, passes: int, heldout: list[Question]) -> None:
        keys = {question.key for question in heldout}
        self.rows = [row for row in rows if row.weight > 0 and row.question.key not in keys]
        if not self.rows:
            raise ConfigError(
                f"{source} has {len(rows)} rows, and each of them is held out or has weight 0. Give it more rows, or set "
                f"data.heldout_size (held out now: {len(heldout)}) or data.heldout."
            )
        self.seed = seed
        self.heldout = heldout
        self._until = np.cumsum([row.weight for row in self.rows])
        self.pass_size = max(1, round(float(self._until[-1])))
        self.size = passes * self.pass_size or None
        self._order = lru_cache(maxsize=2)(self._draw_order)  # an order is asked for once a question

    @property
    def teacher_ids(self) -> frozenset[str]:
        """Every teacher that a row, held out or not, names."""
        return frozenset(question.teacher_id for question in (*self.distinct(), *self.heldout))

    @property
    def digest(self) -> str:
        """Of every row, its weight and its place, and of the held-out ones."""
        return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode([self.rows, self.heldout]))

    def question(self, seq: int) -> Question | None:
        """Question `seq`: a pure function of (seed, dataset). None when the passes are over."""
        if self.size is not None and seq >= self.size:
            return None
        number, place = divmod(seq, self.pass_size)
        return self.rows[self._order(number)[place]].question

    def distinct(self) -> Iterator[Question]:
        """Every question that may be issued, once each."""
        return (row.question for row in self.rows)

    def _draw_order(self, number: int) -> NDArray[np.intp]:
        """The rows of pass `number` in their order.

        Evenly spaced points from a random start over the weights laid end to end: a row of weight w is met w times, give
        or take one, and a row of weight 1 among its likes exactly once.
        """
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, number])))
        points = (np.arange(self.pass_size) + rng.random()) * (self._until[-1] / self.pass_size)
        return rng.permutation(np.searchsorted(self._until, points, side="right").clip(max=len(self.rows) - 1))


def hold_out_last(source: str, rows: Sequence[Weighted], size: int) -> tuple[list[Weighted], list[Question]]:
    """(rows to train on, the last `size` held out). ConfigError when that is more than half."""
    if size > len(rows) // 2:
        raise ConfigError(
            f"data.heldout_size = {size} of the {len(rows)} rows of {source} is more than half. "
            f"Set data.heldout_size to {len(rows) // 2} or less, or name another file in data.heldout."
        )
    cut = len(rows) - size
    return list(rows[:cut]), [row.question for row in rows[cut:]]
