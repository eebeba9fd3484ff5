"""Tiny random students, and batches of random answers with evidence made by numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from streamopd.learn.schedule import Schedule
from streamopd.learn.trainer import AdamW, Trainer
from streamopd.schemas import Array, Batch, Evidence, Finish, Group, Outcome, Prompt, Rollout, Scored, Span, TopK
from streamopd.slots import Branch, ForwardKL, FullVocabulary, Method

FULL = Method(name="full", summary="", branches=(Branch(support=FullVocabulary(), loss=ForwardKL()),))


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of 19 ids, its head tied to its embedding."""
    return _save_model(tmp_path_factory.mktemp("tied"), 19, True)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of 300 ids with a head of its own."""
    return _save_model(tmp_path_factory.mktemp("untied"), 300, False)


def _save_model(path: Path, vocab: int, tie: bool, seed: int | None = None) -> Path:
    torch.manual_seed(vocab if seed is None else seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, pad_token_id=0, eos_token_id=2,
        tie_word_embeddings=tie,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="session")
def elder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random Llama of 300 ids, to teach `untied`."""
    return _save_model(tmp_path_factory.mktemp("elder"), 300, False, seed=7)


@pytest.fixture
def open_trainer() -> Callable[..., Trainer]:
    return _open_trainer


def _open_trainer(folder: Path, method: Method = FULL, **values: object) -> Trainer:
    lr, grad_norm = values.pop("lr", 1e-2), values.pop("max_grad_norm", 1.0)
    settings: dict[str, object] = {
        "adapter": None, "dtype": "float32", "stop_ids": (2,), "pad_id": 0, "max_age": 4,
        "micro_batch_tokens": 128, "head_chunk": 1024, "seed": 0,
    }
    return Trainer(
        folder, method, adam=AdamW(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=grad_norm),
        schedule=Schedule(lr=lr, max_steps=100, warmup_steps=0, hold_fraction=1.0, min_lr_ratio=0.1),
        **(settings | values),
    )


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    return _make_batch


def _make_batch(n: int = 0, seqs: range = range(4), method: Method = FULL, vocab: int = 19, **values: object) -> Batch:
    """Random answers written by weights n, with a random teacher's evidence."""
    items = [_make_item(seq, n, method, vocab, **values) for seq in seqs]
    return Batch(id=f"b{n}", run="r", method=method.digest, born_s=0.0, n=n, items=items)


def _make_item(
    seq: int, n: int, method: Method, vocab: int, length: int | None = None, group_size: int = 1,
    spans: list[Span] | None = None, finish: Finish = Finish.STOP, correct: bool | None = None,
) -> Scored:
    rng = np.random.default_rng(seq)
    prompt_ids = Array.of(rng.integers(3, vocab, rng.integers(1, 9)), "int32")
    rollouts, views = [], []
    for index in range(group_size):
        count = int(rng.integers(1, 14)) if length is None else length
        ids = rng.integers(3, vocab, count)
        if finish is Finish.STOP and count:
            ids[-1] = 2
        rollouts.append(Rollout(
            id=f"p{seq}.{index}", prompt_ids=prompt_ids, completion_ids=Array.of(ids, "int32"),
            logprobs=Array.of(np.full(count, -np.log(vocab)), "float32"), finish=finish,
            weight_spans=(spans or [Span(0, n)]) if count else [],
            outcome=None if correct is None else Outcome(float(correct), correct),
        ))
        views.append([_make_view(rng, rollouts[-1], method, vocab)] if count and finish is not Finish.ERROR else [])
    prompt = Prompt(id=f"p{seq}", run="r", method=method.digest, born_s=0.0, seq=seq, prompt_ids=prompt_ids)
    group = Group(id=f"g{seq}", run="r", method=method.digest, born_s=0.0, prompt=prompt, rollouts=rollouts)
    return Scored(id=f"s{seq}", run="r", method=method.digest, born_s=0.0, group=group, views=views)


def _make_view(rng: np.random.Generator, rollout: Rollout, method: Method, vocab: int) -> Evidence:
    sampled = rollout.completion_ids.numpy()
    logp_GV = rng.normal(size=(len(sampled), vocab)) * 2
    logp_GV -= np.log(np.exp(logp_GV).sum(1, keepdims=True))
    support, mass = _support(rng, logp_GV, sampled, method)
    return Evidence(
        rollout_id=rollout.id, logprobs=Array.of(logp_GV[np.arange(len(sampled)), sampled], "float32"), support=support,
        mass=Array.of(mass, "float32"), entropy=Array.of(-(np.exp(logp_GV) * logp_GV).sum(1), "float32"),
        stop_logmass=Array.of(logp_GV[:, 2], "float32"),
    )


def _support(
    rng: np.random.Generator, logp_GV: NDArray[np.float64], sampled: NDArray[np.int32], method: Method
) -> tuple[TopK, NDArray[np.float64]]:
    """The whole vocabulary, or ragged rows: the best 3, the stop id, the sampled id and a few at random."""
    if isinstance(method.branches[0].support, FullVocabulary):
        return TopK(None, Array.of(logp_GV, "float32")), np.ones(len(sampled))
    rows = [
        sorted({*np.argsort(-row)[:3].tolist(), 2, int(y), *rng.integers(0, len(row), rng.integers(0, 4)).tolist()})
        for row, y in zip(logp_GV, sampled, strict=True)
    ]
    width = max(len(row) for row in rows)
    ids = np.array([row + [-1] * (width - len(row)) for row in rows])
    logp = np.where(ids >= 0, np.take_along_axis(logp_GV, np.maximum(ids, 0), 1), -np.inf)
    return TopK(Array.of(ids, "int32"), Array.of(logp, "float16")), np.exp(logp).sum(1)
