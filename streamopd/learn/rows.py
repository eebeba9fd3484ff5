"""Which answers of a batch are trained, which of their tokens, and how old those are. numpy only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from streamopd.schemas import AUTHORS, Batch, Evidence, Fate, Finish, Rollout, Scored

from .freshness import fresh_mask, keep_answer, token_ages

LENGTH_BIN = 4  # tokens, of the length histograms


class Row(NamedTuple):
    """One answer that is trained."""

    seq: int
    rollout: Rollout
    views: list[Evidence]      # of the teachers, then of the reference; none when the method listens to nobody
    peers: list[Rollout]       # its whole group
    ages: NDArray[np.int32]    # [G]
    fresh: NDArray[np.bool_]   # [G] the tokens that count

    @property
    def teachers(self) -> list[Evidence]:
        return [view for view in self.views if view.role == "teacher"]

    @property
    def reference(self) -> Evidence | None:
        return next((view for view in self.views if view.role == "reference"), None)

    @property
    def view(self) -> Evidence | None:
        """The first teacher's, which speaks for all where monitors want one."""
        return next(iter(self.teachers), None)

    @property
    def authors(self) -> NDArray[np.int64]:
        """[G] who wrote each token: 0 the student, 1 a teacher, 2 the dataset."""
        if not self.rollout.authors:
            return np.zeros(len(self.fresh), np.int64)
        spans = spans_of([author.start for author in self.rollout.authors], len(self.fresh))
        return np.array([AUTHORS.index(author.who) for author in self.rollout.authors])[spans]

    @property
    def steps(self) -> NDArray[np.int64]:
        """[G] the step of the answer that each token belongs to."""
        return spans_of(self.rollout.steps, len(self.fresh))

    @property
    def prompt(self) -> NDArray[np.int32]:
        return self.rollout.prompt_ids.numpy()

    @property
    def completion(self) -> NDArray[np.int32]:
        return self.rollout.completion_ids.numpy()

    @property
    def length(self) -> int:
        """Tokens that the model reads: the last one predicts nothing that we use."""
        return len(self.rollout.prompt_ids) + len(self.rollout.completion_ids) - 1


class Sorted(Struct, frozen=True):
    """A batch, sorted into what is trained and what is not."""

    rows: list[Row]
    fates: list[Fate]                 # one an item
    trained_lengths: dict[str, int]   # bin of completion length -> rollouts
    dropped_lengths: dict[str, int]


def sort_out(batch: Batch, max_age: int) -> Sorted:
    """Tokens older than `max_age` at step `batch.n` are masked; an answer that keeps fewer than half goes whole."""
    rows, fates = [], []
    trained: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for item in batch.items:
        kept = []
        for index, rollout in enumerate(item.group.rollouts):
            row = _row(item, index, batch.n, max_age)
            (dropped if row is None else trained)[_bin(len(rollout.completion_ids))] += 1
            kept += [row] if row is not None else []
        rows += kept
        fates.append(Fate.TRAINED if kept else Fate.EXPIRED)
    return Sorted(rows, fates, dict(trained), dict(dropped))


def _row(item: Scored, index: int, n: int, max_age: int) -> Row | None:
    rollout = item.group.rollouts[index]
    if rollout.finish in (Finish.ERROR, Finish.ABORTED) or not len(rollout.completion_ids):
        return None
    ages = token_ages(rollout.weight_spans, len(rollout.completion_ids), n)
    fresh = fresh_mask(ages, max_age)
    if not keep_answer(fresh):
        return None
    for view in item.views[index]:
        assert view.rollout_id == rollout.id, f"evidence of {view.rollout_id} lies at rollout {rollout.id}"
        assert len(view.logprobs) == len(rollout.completion_ids), f"evidence of rollout {rollout.id} has another length"
    return Row(item.group.prompt.seq, rollout, item.views[index], item.group.rollouts, ages, fresh)


def _bin(length: int) -> str:
    return str(length - length % LENGTH_BIN)


def spans_of(starts: Sequence[int], length: int) -> NDArray[np.int64]:
    """[G] which span each token lies in; no starts: one span."""
    begins = np.zeros(length, np.int64)
    begins[list(starts[1:])] = 1
    return begins.cumsum()
