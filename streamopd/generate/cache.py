"""Keys and values by slot: a row keeps its place while others come and go, so joining and leaving move nothing.

Legend: S slots, B rows at work (slots 0..B-1), L columns, H key-value heads, D head width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from streamopd.errors import UserError


class SlotLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, [S, H, L, D], zero where nothing was written (a masked NaN would still be one)."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def store(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Columns [0, P) of `slots`, from [n, H, P, D]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        columns = keys.shape[2]
        self.keys[slots, :, :columns] = keys
        self.values[slots, :, :columns] = values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """One new column for each row, [B, H, 1, D], at the row's own place; all written so far, [B, H, l, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self._cache
        self.keys[cache.rows_B, :, cache.lengths_B] = key_states.squeeze(2)
        self.values[cache.rows_B, :, cache.lengths_B] = value_states.squeeze(2)
        rows = len(cache.rows_B)
        return self.keys[:rows, :, : cache.longest], self.values[:rows, :, : cache.longest]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.keys = self._empty(key_states)
        self.values = self._empty(value_states)
        self.is_initialized = True

    def move(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        """Copy the first `columns` of slots `sources` over slots `targets`."""
        for store in (self.keys, self.values):
            store[targets, :, :columns] = store[sources, :, :columns]

    def clear(self, slot: int) -> None:
        """Zeros over the whole slot."""
        self.keys[slot], self.values[slot] = 0, 0

    def get_seq_length(self) -> int:
        return self._cache.longest - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.longest, 0

    def widen(self, columns: int) -> None:
        """Room for `columns`, keeping what is there."""
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros((*old.shape[:2], columns, old.shape[3]))
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros((self._cache.slots, like.shape[1], self._cache.columns, like.shape[3]))


class SlotCache(Cache):  # type: ignore[misc]
    """The cache of `slots` rows; `aim` says where the next decode step writes and what it sees."""

    def __init__(self, layers: int, slots: int) -> None:
        self.slots = slots
        self.columns = 0
        self.longest = 1
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    def aim(self, rows_B: Tensor, lengths_B: Tensor, longest: int) -> None:
        """Rows 0..B-1 write column `lengths_B` next, and the step sees `longest` columns."""
        self.rows_B, self.lengths_B, self.longest = rows_B, lengths_B, longest

    def store(self, slots: Tensor, rows: Tensor, filled: DynamicCache) -> None:
        """Copy `filled`'s rows `rows` into `slots`."""
        for layer, source in zip(self.layers, filled.layers, strict=True):
            layer.store(slots, source.keys[rows], source.values[rows])

    def move(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        for layer in self.layers:
            if layer.is_initialized:
                layer.move(sources, targets, columns)

    def clear(self, slot: int) -> None:
        for layer in self.layers:
            layer.clear(slot)

    def make_room(self, columns: int) -> None:
        """At least `columns` a slot."""
        if columns <= self.columns:
            return
        self.columns = -(-columns // 16) * 16  # tight: a step reads every row, and gaps between rows slow it down
        for layer in self.layers:
            if layer.is_initialized:
                layer.widen(self.columns)


def require_full_attention(config: PretrainedConfig, folder: Path, who: str) -> None:
    """UserError unless every layer keeps plain keys and values of every token."""
    layers = DynamicCache(config=config).layers
    odd = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
    if odd or not layers:
        raise UserError(
            f"{folder} is a {config.model_type} model with {', '.join(sorted(odd)) or 'no'} cache layers; "
            "generator.engine = \"hf\" serves full attention in every layer.\n"
            f"Choose a {who} with full attention only."
        )
