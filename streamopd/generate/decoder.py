"""A causal language model and its slots: fill caches from ids, and advance every row by one token.

Legend: B rows at work, P prompt columns, V ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .cache import SlotCache

FILL_TOKENS = 8192  # in one forward of `fill`, padding included


class Decoder:
    """Everything that touches the model; callers hold numpy arrays."""

    def __init__(self, model: PreTrainedModel, slots: int, pad_id: int) -> None:
        self._model = model
        self._pad_id = pad_id
        self._trunk = model.base_model  # a fill needs no logits
        self._config = model.config
        self._cache_argument = _cache_argument(model)
        self._cache = SlotCache(len(DynamicCache(config=model.config).layers), slots)
        self._hidden = torch.finfo(model.dtype).min

    def make_room(self, columns: int) -> None:
        """At least `columns` tokens in each slot."""
        self._cache.make_room(columns)

    def move(self, sources: NDArray[np.int64], targets: NDArray[np.int64], columns: int) -> None:
        """Slots `sources` over slots `targets`, up to `columns` tokens."""
        self._cache.move(self._on_device(sources), self._on_device(targets), columns)

    def clear(self, slot: int) -> None:
        """Forget a slot whose values are not finite: masked, they would still poison its next holder."""
        self._cache.clear(slot)

    @torch.inference_mode()
    def fill(self, sequences: Mapping[int, NDArray[np.int64]]) -> None:
        """Make slot s hold the keys and values of `sequences[s]`; equal sequences are computed once."""
        slots_of: dict[bytes, list[int]] = {}
        for slot, ids in sequences.items():
            if len(ids):
                slots_of.setdefault(ids.tobytes(), []).append(slot)
        for chunk in _chunks(sorted(slots_of, key=len)):
            self._fill_chunk([np.frombuffer(ids, np.int64) for ids in chunk], [slots_of[ids] for ids in chunk])

    @torch.inference_mode()
    def advance(self, ids_B: NDArray[np.int64], lengths_B: NDArray[np.int64]) -> Tensor:
        """Feed row b, which holds `lengths_B[b]` tokens, its next one; float32 logits of the one after, [B, V]."""
        tokens, lengths = self._on_device(ids_B), self._on_device(lengths_B)
        longest = int(lengths_B.max()) + 1
        seen_BL = torch.arange(longest, device=lengths.device) <= lengths[:, None]
        bias_BL = torch.zeros_like(seen_BL, dtype=self._model.dtype).masked_fill_(~seen_BL, self._hidden)
        self._cache.aim(torch.arange(len(lengths), device=lengths.device), lengths, longest)
        out = self._model(
            input_ids=tokens[:, None], attention_mask=bias_BL[:, None, None], position_ids=lengths[:, None],
            use_cache=True, **{self._cache_argument: self._cache},
        )
        logits_BV: Tensor = out.logits[:, -1].float()
        return logits_BV

    def _fill_chunk(self, sequences: list[NDArray[np.int64]], slots: list[list[int]]) -> None:
        """Right-padded, so causal attention alone hides the padding; what it leaves in the cache is never seen."""
        ids_nP = np.full((len(sequences), max(map(len, sequences))), self._pad_id, np.int64)
        for row, ids in enumerate(sequences):
            ids_nP[row, : len(ids)] = ids
        filled = DynamicCache(config=self._config)
        self._trunk(input_ids=self._on_device(ids_nP), use_cache=True, **{self._cache_argument: filled})
        rows = np.repeat(np.arange(len(slots)), [len(some) for some in slots])
        targets = np.concatenate([np.asarray(some, np.int64) for some in slots])
        self._cache.store(self._on_device(targets), self._on_device(rows), filled)

    def _on_device(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._model.device)


def _cache_argument(model: PreTrainedModel) -> str:
    """What this release of transformers calls it; the older name goes away in 5.40."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _chunks(ordered: list[bytes]) -> Iterator[list[bytes]]:
    """Runs of sequences (ascending in length) whose padded size stays within FILL_TOKENS."""
    chunk: list[bytes] = []
    for ids in ordered:
        if chunk and (len(chunk) + 1) * (len(ids) // 8) > FILL_TOKENS:
            yield chunk
            chunk = []
        chunk.append(ids)
    if chunk:
        yield chunk
