"""KL between two causal models along given answers, exact over the vocabulary, a few rows of logits at a time.

Shape suffixes: R rows (one a predicted token), D width, V vocabulary, B answers in a micro-batch, L padded length.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor, nn

from streamopd.errors import UserError
from streamopd.layout import cut_micro_batches, pad_right, predicting_positions

Ids = NDArray[np.int32]
MIN_PREFIX = 16         # a shorter shared context is not worth a cache
TOKEN_BUDGET = 4096     # padded tokens in one forward
LOGIT_BUDGET = 1 << 22  # log-probs of one model that exist at once: 16 MiB of float32


class Pair(Struct, frozen=True):
    """One answer seen by two models, each after its own context."""

    p_context: Ids   # int32 [P]
    q_context: Ids   # int32 [Q]
    completion: Ids  # int32 [G]


@torch.no_grad()
def summed_kls(p: nn.Module, q: nn.Module, pairs: Sequence[Pair]) -> list[float]:
    """KL(p‖q) in nats, summed over each answer's tokens; in the order of `pairs`. An empty answer has 0."""
    reader_p = Reader(p, [pair.p_context for pair in pairs])
    reader_q = Reader(q, [pair.q_context for pair in pairs])
    sums = [0.0] * len(pairs)
    for batch in _micro_batches(pairs):
        completions = [pairs[i].completion for i in batch]
        hidden_p_RD = reader_p.hidden([pairs[i].p_context for i in batch], completions)
        hidden_q_RD = reader_q.hidden([pairs[i].q_context for i in batch], completions)
        kl_R = torch.cat(list(_kl_chunks(reader_p, reader_q, hidden_p_RD, hidden_q_RD)))
        for i, own_G in zip(batch, torch.split(kl_R, [len(c) for c in completions]), strict=True):
            sums[i] = float(own_G.double().sum())
    return sums


class Reader:
    """A model that reads answers: the contexts' common beginning goes through it once."""

    def __init__(self, model: nn.Module, contexts: Sequence[Ids]) -> None:
        self.trunk, self.head = trunk_and_head(model)
        self.config = cast(Any, model).config
        self.device = next(model.parameters()).device
        self.prefix = _common_prefix(contexts)
        self._cache = self._read_prefix() if self.prefix else None

    def hidden(self, contexts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
        """The hidden states that predict the completions' tokens, answer after answer: [R, D]."""
        start = len(self.prefix)
        rows = [np.concatenate([c[start:], a[:-1]]) for c, a in zip(contexts, completions, strict=True)]
        ids_BL = torch.from_numpy(pad_right(rows, pad_id=0)).to(self.device)
        hidden_BLD = self.trunk(input_ids=ids_BL, **self._cached(len(rows))).last_hidden_state
        where = predicting_positions([len(c) - start for c in contexts], [len(a) for a in completions], ids_BL.shape[1])
        hidden_RD: Tensor = hidden_BLD.flatten(0, 1)[torch.from_numpy(where).to(self.device)]
        return hidden_RD

    def log_probs(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] float32."""
        logits_RV: Tensor = self.head(hidden_RD)
        return logits_RV.float().log_softmax(-1)

    def _read_prefix(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.config)
        self.trunk(input_ids=torch.tensor([self.prefix], device=self.device), cache=cache, use_cache=True)
        return cache

    def _cached(self, rows: int) -> dict[str, Any]:
        """The prefix's keys and values once a row; right padding after them needs no mask."""
        if self._cache is None:
            return {"use_cache": False}
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return {"cache": cache, "use_cache": True}


def trunk_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The transformer below the logits and the output layer, proven to be the whole of `model`'s forward."""
    trunk, head = cast(Any, model).base_model, cast(Any, model).get_output_embeddings()
    probe = torch.arange(2, device=next(model.parameters()).device)[None]
    with torch.no_grad():
        ours, theirs = head(trunk(input_ids=probe).last_hidden_state), cast(Any, model)(input_ids=probe).logits
    apart = float((ours - theirs).abs().max())
    if apart > 1e-3 * (1 + float(theirs.abs().max())):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output layer: up to {apart:.3g} apart from trunk and head "
            "alone. Held-out KL cannot be computed for it; set evaluate.enabled = false."
        )
    return trunk, head


def _kl_chunks(p: Reader, q: Reader, hidden_p_RD: Tensor, hidden_q_RD: Tensor) -> Iterator[Tensor]:
    """KL a row, for a few rows at a time. Ids beyond the smaller vocabulary are padding that no tokenizer reaches."""
    vocabulary = min(p.config.vocab_size, q.config.vocab_size)
    size = max(1, LOGIT_BUDGET // vocabulary)
    for rows_p_RD, rows_q_RD in zip(torch.split(hidden_p_RD, size), torch.split(hidden_q_RD, size), strict=True):
        p_RV, q_RV = (r.log_probs(h)[:, :vocabulary] for r, h in ((p, rows_p_RD), (q, rows_q_RD)))
        yield (p_RV.exp() * (p_RV - q_RV)).sum(-1)


def _micro_batches(pairs: Sequence[Pair]) -> Iterator[list[int]]:
    """Indices of non-empty answers, similar lengths together."""
    filled = [i for i, pair in enumerate(pairs) if len(pair.completion)]
    lengths = [max(len(pairs[i].p_context), len(pairs[i].q_context)) + len(pairs[i].completion) for i in filled]
    for batch in cut_micro_batches(lengths, TOKEN_BUDGET):
        yield [filled[i] for i in batch]


def _common_prefix(contexts: Sequence[Ids]) -> list[int]:
    """What all contexts begin with, less the last token (the first answer token is predicted there); [] when short."""
    shortest = min((len(context) - 1 for context in contexts), default=0)
    heads = np.array([context[:shortest] for context in contexts])
    differs = np.flatnonzero((heads != heads[:1]).any(0)) if shortest else np.zeros(0, np.intp)
    length = int(differs[0]) if len(differs) else shortest
    return heads[0, :length].tolist() if length >= MIN_PREFIX else []
