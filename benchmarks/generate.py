"""Tokens a second of our engines, with the log-probs that distillation needs, against the libraries' own `generate`.

    python -m benchmarks.generate --engine hf [--models 0.6M 135M] [--prompts 32] [--tokens 32] [--times 3]
    .venv-vllm/bin/python -m benchmarks.generate --engine vllm

One row a model: the same prompts, as many tokens each and no stop, at temperature 1, in turn in one process:
`plain` (transformers' or vLLM's generate, text-free, no log-probs), `ours` without the student's top ids and `ours k=16`.
`payload`: bytes of arrays a token that an answer carries, ids included. The best of `times` rounds of each.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.clock import machine, store
from benchmarks.models import SHAPES, random_model
from streamopd.generate.engine import Answer, Engine, Request
from streamopd.generate.open import open_engine
from streamopd.schemas import encode
from streamopd.sync.swap import Loader

PROMPT = 16
TOP = 16


def prompts(count: int, vocab: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(3, vocab, (count, PROMPT), dtype=np.int32))


def ours(engine: Engine, asked: list[np.ndarray], tokens: int, tag: str) -> list[Answer]:
    engine.admit([Request(id=f"{tag}.{i}", prompt_ids=ids, seed=(0, i), max_new=tokens) for i, ids in enumerate(asked)])
    answers: list[Answer] = []
    while engine.inflight:
        answers += engine.step()
    assert sum(len(answer.completion_ids) for answer in answers) == len(asked) * tokens
    return answers


def plain_hf(folder: Path, asked: list[np.ndarray], tokens: int) -> Callable[[int], object]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.stack(asked)).long()

    def work(_: int) -> None:
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=tokens,
                min_new_tokens=tokens, pad_token_id=0,
            )
        assert out.shape[1] == PROMPT + tokens

    return work


def plain_vllm(folder: Path, asked: list[np.ndarray], tokens: int) -> Callable[[int], object]:
    from vllm import LLM, SamplingParams

    import streamopd.generate.vllm  # noqa: F401  sets what vllm reads when it is imported

    llm = LLM(
        str(folder), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=len(asked), gpu_memory_utilization=0.3,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    def work(_: int) -> None:
        outs = llm.generate([{"prompt_token_ids": ids.tolist()} for ids in asked], params, use_tqdm=False)
        assert sum(len(out.outputs[0].token_ids) for out in outs) == len(asked) * tokens

    return work


def best(rounds: int, works: dict[str, Callable[[int], object]]) -> dict[str, float]:
    """Seconds of the fastest round of each, one after another in every round, after one that warms up."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work(number)
            found[name].append(time.perf_counter() - started)
    return {name: min(times[1:]) for name, times in found.items()}


def measure(name: str, kind: str, count: int, tokens: int, times: int, scratch: Path) -> dict[str, Any]:
    """One row. Transformers' three take turns; vLLM has one engine in a process at a time, so there each is gone before the next."""
    folder, vocab = random_model(name, scratch / "model"), SHAPES[name]["vocab_size"]
    asked, total = prompts(count, vocab), count * tokens
    payloads: dict[str, float] = {}

    def open_ours(title: str, k: int) -> Callable[[int], object]:
        engine = open_engine(
            kind, folder=folder, stop_ids=(), loader=Loader(folder), max_inflight=count, student_k=k, memory_fraction=0.3
        )
        payloads[title] = sum(len(encode(a.rollout())) for a in ours(engine, asked, tokens, "p")) / total
        return partial(_write, engine, asked, tokens)

    openers = {
        "plain": partial(plain_hf if kind == "hf" else plain_vllm, folder, asked, tokens),
        "ours": partial(open_ours, "ours", 0), f"ours k={TOP}": partial(open_ours, f"ours k={TOP}", TOP),
    }
    if kind == "hf":
        seconds = best(times, {title: opener() for title, opener in openers.items()})
    else:
        seconds = {}
        for title, opener in openers.items():
            seconds |= best(times, {title: opener()})
            gc.collect()
    row: dict[str, Any] = {"model": name, "engine": kind} | {title: round(total / s, 1) for title, s in seconds.items()}
    for title, payload in payloads.items():
        row |= {f"{title} / plain": round(row[title] / row["plain"], 3), f"{title}, payload": round(payload, 1)}
    return row


def _write(engine: Engine, asked: list[np.ndarray], tokens: int, number: int) -> None:
    ours(engine, asked, tokens, str(number))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    arguments.add_argument("--models", nargs="+", choices=list(SHAPES), default=["0.6M", "135M"])
    arguments.add_argument("--prompts", type=int, default=32)
    arguments.add_argument("--tokens", type=int, default=32)
    arguments.add_argument("--times", type=int, default=3)
    arguments.add_argument("--out", type=Path)
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    about = {"prompts": asked.prompts, "tokens": asked.tokens, "prompt_tokens": PROMPT, "unit": "tokens/s"}
    result: dict[str, Any] = {"machine": machine(), **about, "rows": []}
    for name in asked.models:
        with tempfile.TemporaryDirectory() as scratch:
            result["rows"].append(measure(name, asked.engine, asked.prompts, asked.tokens, asked.times, Path(scratch)))
        print(json.dumps(result["rows"][-1]), flush=True)
        store(asked.out or Path(f"benchmarks/results/generate_{asked.engine}.json"), result)


if __name__ == "__main__":
    main()
