"""A causal language model from a folder, and what it can read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from .cache import require_full_attention


def open_model(folder: Path, dtype: str, device: str = "", who: str = "student") -> PreTrainedModel:
    """The frozen model, on `device` ("": a GPU where there is one). UserError when a layer keeps anything but full keys and values."""
    disable_progress_bar()
    require_full_attention(AutoConfig.from_pretrained(folder, local_files_only=True), folder, who)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True
    )
    model.requires_grad_(False)
    return model.eval().to(where)


def vocab_size(model: PreTrainedModel) -> int:
    """Ids that it has a log-prob for."""
    return int(model.get_output_embeddings().weight.shape[0])


def positions(model: PreTrainedModel) -> int:
    """Tokens that a text may have; a configuration that names no limit has none."""
    return int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 60)


def unreadable(
    ids: NDArray[np.int32], max_new: int, vocab: int, longest: int, who: str = "model", given: NDArray[np.int32] | None = None
) -> str:
    """Why a model of `vocab` ids and `longest` positions cannot write `max_new` tokens after `ids`, or those `given`; "" when it can."""
    if len(ids) == 0 or max_new < 1:
        return f"A request of {len(ids)} prompt tokens and at most {max_new} new ones has nothing to write."
    for what, some in (("prompt", ids), ("gold answer", ids if given is None else given)):
        if some.min() < 0 or some.max() >= vocab:
            return f"The {what} holds ids from {some.min()} to {some.max()}; the {who} has {vocab} of them."
    if len(ids) + max_new > longest:
        return f"{len(ids)} prompt and {max_new} new tokens are more than the {who}'s {longest} positions."
    return ""
