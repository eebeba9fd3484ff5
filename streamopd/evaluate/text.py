"""What a run did to the model otherwise: perplexity of plain text that no recipe trains on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from streamopd.evaluate.divergence import LOGIT_BUDGET, Reader

PLAIN_TEXTS = (
    """The ferry leaves at seven, before the fog has lifted. On deck a boy counts gulls aloud, loses his place, and
begins again from one while his grandfather pours tea from a dented flask.""",
    """A river carries sand as long as it flows fast. Where the valley widens the water slows down, the heaviest
grains sink first, and over the centuries a flat and fertile plain is built up.""",
    """def longest(words):
    best = ""
    for word in words:
        if len(word) > len(best):
            best = word
    return best
""",
    """Before you paint a door, take it off its hinges and lay it flat. Sand it lightly, wipe off the dust, and put
on two thin coats; leave the first one to dry overnight.""",
    """The town council has agreed to keep the swimming pool open through the winter. The cost will be shared with
three neighbouring villages, whose schools have asked for lessons on weekday mornings.""",
)


@torch.no_grad()
def text_perplexity(model: nn.Module, encode: Callable[[str], list[int]], texts: Sequence[str] = PLAIN_TEXTS) -> float:
    """exp of the mean negative log-likelihood a token over all texts; the first token of each is given, not predicted."""
    reader = Reader(model, [])
    nats, tokens = 0.0, 0
    for text in texts:
        ids = np.asarray(encode(text), np.int32)
        hidden_RD = reader.hidden([ids[:1]], [ids[1:]])
        targets_R = torch.from_numpy(ids[1:].astype(np.int64)).to(hidden_RD.device)
        size = max(1, LOGIT_BUDGET // reader.config.vocab_size)
        for rows_RD, own_R in zip(torch.split(hidden_RD, size), torch.split(targets_R, size), strict=True):
            nats -= float(reader.log_probs(rows_RD).gather(-1, own_R[:, None]).double().sum())
        tokens += len(ids) - 1
    return math.exp(nats / tokens)
