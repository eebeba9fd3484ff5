"""Tiny random teachers and groups of random answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from streamopd.schemas import Array, Finish, Group, Prompt, Rollout, Span, TopK


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of 300 ids."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, pad_token_id=0, eos_token_id=2,
    )
    path = tmp_path_factory.mktemp("teacher")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


GroupMaker = Callable[..., Group]


@pytest.fixture
def make_group() -> GroupMaker:
    return _make_group


def _make_group(
    seq: int = 0, lengths: tuple[int, ...] = (7,), prompt: int = 5, shared: int = 0, teacher_prompt: int = 0,
    vocab: int = 300, student_k: int = 4, finish: Finish = Finish.STOP,
) -> Group:
    """Random ids; the first `shared` context tokens are the same for every seq."""
    rng = np.random.default_rng(seq)
    head = np.random.default_rng(99).integers(3, vocab, shared)

    def context(length: int) -> Array:
        return Array.of(np.concatenate([head, rng.integers(3, vocab, length)]), "int32")

    prompt_ids = context(prompt)
    rollouts = [
        _make_rollout(rng, f"p{seq}.{i}", prompt_ids, length, vocab, student_k, finish) for i, length in enumerate(lengths)
    ]
    return Group(
        id=f"g{seq}", run="r", method="m", born_s=0.0, rollouts=rollouts,
        prompt=Prompt(
            id=f"p{seq}", run="r", method="m", born_s=0.0, seq=seq, prompt_ids=prompt_ids,
            teacher_prompt_ids=context(teacher_prompt) if teacher_prompt else None,
        ),
    )


def _make_rollout(
    rng: np.random.Generator, name: str, prompt_ids: Array, length: int, vocab: int, student_k: int, finish: Finish
) -> Rollout:
    ids = np.array([rng.choice(vocab, student_k, replace=False) for _ in range(length)]).reshape(length, student_k)
    return Rollout(
        id=name, prompt_ids=prompt_ids, completion_ids=Array.of(rng.integers(3, vocab, length), "int32"),
        logprobs=Array.of(np.full(length, -1.0), "float32"), weight_spans=[Span(0, 0)] if length else [], finish=finish,
        student_topk=TopK(Array.of(ids, "int32"), Array.of(np.full(ids.shape, -2.0), "float16")) if student_k else None,
    )
