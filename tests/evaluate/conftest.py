"""Two tiny models with one vocabulary, and held-out prompts for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from streamopd.schemas import Array, Prompt

VOCABULARY = 24


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)  # far from uniform
    return model


@pytest.fixture(scope="session")
def student() -> LlamaForCausalLM:
    return tiny(1)


@pytest.fixture(scope="session")
def teacher() -> LlamaForCausalLM:
    return tiny(2)


@pytest.fixture(scope="session")
def student_folder(student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    student.save_pretrained(folder)
    return folder


def prompt(seq: int, ids: list[int], teacher_ids: list[int] | None = None, teacher_id: str = "default", **meta: str) -> Prompt:
    return Prompt(
        id=f"h{seq}", run="r", method="m", born_s=0.0, seq=seq, prompt_ids=Array.of(ids, "int32"), text=f"question {seq}",
        teacher_prompt_ids=None if teacher_ids is None else Array.of(teacher_ids, "int32"), teacher_id=teacher_id, meta=meta,
    )
