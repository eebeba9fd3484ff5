"""A few log-probs a token: what a teacher returns, and what the student thought at sampling time."""

from __future__ import annotations

from msgspec import Struct

from .array import Array, refuse_impossible


class TopK(Struct, array_like=True, omit_defaults=True, frozen=True):
    """Log-probs on a few ids a token. `ids` None means column v is id v (the whole vocabulary)."""

    ids: Array | None      # int32 [G, K]; -1 pads a ragged row
    logprobs: Array        # float16 or float32 [G, K]; -inf on padding

    def __post_init__(self) -> None:
        if len(self.logprobs.shape) != 2 or (self.ids is not None and self.ids.shape != self.logprobs.shape):
            raise ValueError(f"support ids {self.ids and self.ids.shape} and log-probs {self.logprobs.shape} are not one [G, K] pair")
        refuse_impossible(self.logprobs, "support log-probs", padding=True)
