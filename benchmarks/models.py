"""Random models of known shapes, as HF folders: what is timed here does not depend on what weights say."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from streamopd.assets import resolve

SHAPES: dict[str, dict[str, int]] = {
    "0.6M": dict(vocab_size=19, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4),
    "135M": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    ),
    "500M": dict(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    ),
}


def random_model(name: str, folder: Path, dtype: str = "float32") -> Path:
    """A tied Llama of that shape in `folder`; the tokenizer of the quickstart lies beside it, for servers that want one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[name], max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.02, eos_token_id=None
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(resolve("asset:quickstart-student") / file, folder / file)
    return folder
