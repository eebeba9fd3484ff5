"""Tiny random language models as HF folders, an engine over them, and versions to swap in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from streamopd.generate.decoder import _cache_argument
from streamopd.generate.engine import Answer, Engine, Request
from streamopd.generate.hf import HFEngine
from streamopd.schemas import Weights
from streamopd.sync.publish import publish
from streamopd.sync.swap import Loader

disable_progress_bar()
VOCABULARY, STOP, POSITIONS = 19, 2, 96


def save_llama(path: Path, tied: bool, seed: int = 5, vocabulary: int = VOCABULARY) -> Path:
    """Two random layers, far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, tie_word_embeddings=tied, initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("teacher"), tied=False, seed=6)


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


OpenEngine = Callable[..., HFEngine]


@pytest.fixture
def open_hf(folder: Path) -> OpenEngine:
    def open_one(
        where: Path = folder, max_inflight: int = 8, stop_ids: tuple[int, ...] = (STOP,), **values: object
    ) -> HFEngine:
        return HFEngine(where, stop_ids=stop_ids, max_inflight=max_inflight, loader=Loader(), **values)

    return open_one


Publish = Callable[..., Weights]


@pytest.fixture
def publish_shaken(folder: Path, tmp_path: Path) -> Publish:
    """Weights n: the folder's, each tensor shaken with its own noise; `fill` makes every value the same instead."""

    def publish_one(n: int, where: Path = folder, fill: float | None = None) -> Weights:
        torch.manual_seed(n)
        parameters = dict(plain(where).named_parameters())
        shaken = {k: p.detach() + 0.05 * torch.randn_like(p) for k, p in parameters.items()}
        if fill is not None:
            shaken = {name: torch.full_like(tensor, fill) for name, tensor in shaken.items()}
        return publish("r", "b", n, shaken, where, tmp_path, keep=8, fsync=False)

    return publish_one


def requests(count: int, max_new: int = 20, prompt: int = 12, first: int = 0) -> list[Request]:
    """Prompts of 1 to `prompt` ids, each with its own seed."""
    rng = np.random.default_rng(first)
    return [
        Request(f"p{i}.0", rng.integers(3, VOCABULARY, rng.integers(1, prompt + 1)).astype(np.int32), (7, i), max_new)
        for i in range(first, first + count)
    ]


def answer_all(engine: Engine, todo: list[Request], at_once: int = 10**6) -> dict[str, Answer]:
    """Every answer by request id; at most `at_once` requests are admitted between two steps."""
    todo, done = list(todo), {}
    while todo or engine.inflight:
        count = min(engine.free, at_once, len(todo))
        engine.admit(todo[:count])
        del todo[:count]
        done |= {answer.request.id: answer for answer in engine.step()}
    return done


@torch.inference_mode()
def student_logits(answer: Answer, models: dict[int, PreTrainedModel]) -> Tensor:
    """[G, V] of each completion token, by the rule that the spans state, with plain forwards of each version.

    A token under version v comes from feeding the one before it with v's weights. What lies further back was fed
    under older ones (keep), or is fed again under v (recompute).
    """
    prompt, ids = answer.request.prompt_ids.tolist(), answer.completion_ids.tolist()
    fed = prompt + ids[:-1]
    bounds = [span.start for span in answer.spans[1:]] + [len(ids)]
    config = next(iter(models.values())).config
    cache, rows = DynamicCache(config=config), []
    for span, end in zip(answer.spans, bounds, strict=True):
        if span.kv == "recompute":
            cache = DynamicCache(config=config)
        known, upto = cache.get_seq_length(), len(prompt) + end - 1
        model = models[span.version]
        out = model(input_ids=torch.tensor([fed[known:upto]]), use_cache=True, **{_cache_argument(model): cache})
        rows.append(out.logits[0, -(end - span.start) :])
    return torch.cat(rows)
