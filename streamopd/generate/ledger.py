"""What is known of each slot: who is in it, what it wrote so far, under which weights. Plain numpy, a row a slot.

A row's last id has not been fed yet: `lengths` counts the fed ones, so it is also the place where the last id goes.
An empty slot reads as the one-token prompt [pad] with nothing written; it may be decoded along and is never read.
Legend: S slots, B rows at work, W ids of prompt and completion, G new tokens, K of a top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamopd.schemas import Author, Span

from .draws import uniforms
from .engine import Request


class Ledger:
    """The rows of an engine with `slots` slots that records `k` of the student's own ids a token."""

    def __init__(self, slots: int, k: int, pad_id: int) -> None:
        self._pad_id = pad_id
        self.requests: list[Request | None] = [None] * slots
        self.spans: list[list[Span]] = [[] for _ in range(slots)]
        self.live = np.zeros(slots, bool)
        self.lengths = np.zeros(slots, np.int64)
        self.prompt_lengths = np.ones(slots, np.int64)
        self.limits = np.ones(slots, np.int64)
        self.ids = np.full((slots, 2), pad_id, np.int64)         # [S, W]
        self.uniform = np.zeros((slots, 1), np.float32)          # [S, G]
        self.logprobs = np.zeros((slots, 1), np.float32)         # [S, G]
        self.by_teacher = np.zeros((slots, 1), bool)             # [S, G]
        self.topk_ids = np.zeros((slots, 1, k), np.int32)        # [S, G, K]
        self.topk_logprobs = np.zeros((slots, 1, k), np.float16)

    @property
    def rows(self) -> int:
        """B: one more than the last live slot."""
        live = np.flatnonzero(self.live)
        return int(live[-1]) + 1 if len(live) else 0

    @property
    def inflight(self) -> int:
        return int(self.live.sum())

    def seat(self, requests: Sequence[Request], version: int) -> list[int]:
        """Put requests into the lowest empty slots, and say which."""
        self._make_room(requests)
        slots = [int(slot) for slot in np.flatnonzero(~self.live)[: len(requests)]]
        for slot, request in zip(slots, requests, strict=True):
            prompt = len(request.prompt_ids)
            self.requests[slot] = request
            self.spans[slot] = [Span(0, version)]
            self.live[slot] = True
            self.lengths[slot] = prompt - 1
            self.prompt_lengths[slot] = prompt
            self.limits[slot] = request.max_new
            self.ids[slot, :prompt] = request.prompt_ids
            self.uniform[slot, : request.max_new] = uniforms(request.seed, request.max_new)
            self.by_teacher[slot] = False
        return slots

    def fed(self, slots: Sequence[int]) -> dict[int, NDArray[np.int64]]:
        """The ids that each slot's cache must hold."""
        return {slot: self.ids[slot, : self.lengths[slot]] for slot in slots}

    def next_ids(self, rows: int) -> NDArray[np.int64]:
        """The id that each row feeds now, [B]."""
        return self.ids[np.arange(rows), self.lengths[:rows]]

    def draws(self, rows: int) -> NDArray[np.float32]:
        """The uniform that decides each row's next token, [B]."""
        return self.uniform[np.arange(rows), self.written(rows)]

    def dictated(self, rows: int) -> dict[int, int]:
        """The next id of each row that writes what it is given."""
        return {
            row: int(request.gold_ids[self.length(row)])
            for row, request in enumerate(self.requests[:rows]) if request is not None and request.gold_ids is not None
        }

    def write(
        self, ids_B: NDArray[np.int64], logp_B: NDArray[np.float32], by_teacher_B: NDArray[np.bool_] | None = None
    ) -> None:
        """Append one token to each row; None: the student's, all of them."""
        rows, written_B = np.arange(len(ids_B)), self.written(len(ids_B))
        self.logprobs[rows, written_B] = logp_B
        if by_teacher_B is not None:
            self.by_teacher[rows, written_B] = by_teacher_B
        self.ids[rows, self.lengths[: len(ids_B)] + 1] = ids_B
        self.lengths[: len(ids_B)] += self.live[: len(ids_B)]

    def write_topk(self, ids_BK: NDArray[np.int32], logp_BK: NDArray[np.float16]) -> None:
        """The student's own most probable ids for the token about to be written."""
        rows, written = np.arange(len(ids_BK)), self.written(len(ids_BK))
        self.topk_ids[rows, written] = ids_BK
        self.topk_logprobs[rows, written] = logp_BK

    def length(self, slot: int) -> int:
        """Tokens that a slot has written."""
        return int(self.lengths[slot] + 1 - self.prompt_lengths[slot])

    def full(self, rows: int) -> NDArray[np.bool_]:
        """Which rows have written all they may, [B]."""
        return self.written(rows) >= self.limits[:rows]

    def turn(self, version: int, kv: str) -> None:
        """What live rows write from here on is written under `version`."""
        for slot in np.flatnonzero(self.live).tolist():
            spans, written = self.spans[slot], self.length(slot)
            if spans[-1].start == written:
                spans.pop()
            spans.append(Span(written, version, kv))

    def read(self, slot: int, length: int) -> dict[str, Any]:
        """The first `length` tokens that a slot wrote, as an Answer's fields."""
        start, request = int(self.prompt_lengths[slot]), self.requests[slot]
        given = request is not None and request.gold_ids is not None
        fields: dict[str, Any] = {
            "completion_ids": self.ids[slot, start : start + length].astype(np.int32),
            "logprobs": self.logprobs[slot, :length].copy(),
            "spans": [span for span in self.spans[slot] if span.start < length],
            "authors": [Author(0, "gold")] if given else authors(self.by_teacher[slot, :length]),
        }
        if self.topk_ids.shape[-1]:
            fields["topk_ids"] = self.topk_ids[slot, :length].copy()
            fields["topk_logprobs"] = self.topk_logprobs[slot, :length].copy()
        return fields

    def leave(self, slot: int) -> Request:
        """Empty a slot; the request that was in it."""
        request = self.requests[slot]
        assert request is not None
        self.requests[slot] = None
        self.live[slot] = False
        self.lengths[slot], self.prompt_lengths[slot], self.limits[slot] = 0, 1, 1
        self.ids[slot, 0] = self._pad_id
        return request

    def gaps(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(sources, targets): the moves after which the live rows are the first ones."""
        count = self.inflight
        targets = np.flatnonzero(~self.live[:count])
        sources = np.flatnonzero(self.live[count:]) + count
        return sources, targets

    def move(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Rows `sources` over the empty rows `targets`."""
        for array in (self.live, self.lengths, self.prompt_lengths, self.limits, self.ids, self.uniform, self.logprobs,
                      self.by_teacher, self.topk_ids, self.topk_logprobs):
            array[targets] = array[sources]
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self.requests[target], self.spans[target] = self.requests[source], self.spans[source]
            self.leave(source)

    def written(self, rows: int) -> NDArray[np.int64]:
        """Tokens that each row has written, [B]."""
        return self.lengths[:rows] + 1 - self.prompt_lengths[:rows]

    def _make_room(self, requests: Sequence[Request]) -> None:
        width = max(len(request.prompt_ids) + request.max_new for request in requests)
        new = max(request.max_new for request in requests)
        self.ids = _widened(self.ids, width + 1)
        for name in ("uniform", "logprobs", "by_teacher", "topk_ids", "topk_logprobs"):
            setattr(self, name, _widened(getattr(self, name), new + 1))


def authors(by_teacher_G: NDArray[np.bool_]) -> list[Author]:
    """Who wrote which tokens; [] when the student wrote them all."""
    if not by_teacher_G.any():
        return []
    starts = [0, *(np.flatnonzero(by_teacher_G[1:] != by_teacher_G[:-1]) + 1).tolist()]
    return [Author(start, "teacher" if by_teacher_G[start] else "student") for start in starts]


def _widened(array: NDArray[Any], columns: int) -> NDArray[Any]:
    """At least `columns` in the second dimension."""
    if array.shape[1] >= columns:
        return array
    wide = np.zeros((array.shape[0], columns, *array.shape[2:]), array.dtype)
    wide[:, : array.shape[1]] = array
    return wide
