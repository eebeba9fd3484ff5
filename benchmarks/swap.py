"""How long a generator stands still for new weights, and how long they are on their way, against copying the same bytes.

    python -m benchmarks.swap --engine hf [--models 0.6M 135M 500M] [--times 5] [--out benchmarks/results/swap_hf.json]
    .venv-vllm/bin/python -m benchmarks.swap --engine vllm

Each swap has four answers in flight. `memcpy_s`: the tensors copied into others of this process, the fastest of as many
tries. `pause_s`: no token is written; reading and verifying go on beside. `publish_s`: from tensors to a whole folder;
`way_s`: from tensors to served.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.clock import machine, store
from benchmarks.models import SHAPES, random_model
from streamopd.generate.engine import Request
from streamopd.generate.open import open_engine
from streamopd.sync.adapter import tensors_of
from streamopd.sync.publish import publish
from streamopd.sync.swap import Loader


def memcpy_s(tensors: dict[str, torch.Tensor], times: int) -> float:
    """The fastest copy of all of them into storages that are there."""
    there = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    found = []
    for _ in range(times + 1):  # the first one makes the pages
        started = time.perf_counter()
        for name, tensor in tensors.items():
            there[name].copy_(tensor)
        found.append(time.perf_counter() - started)
    return min(found[1:])


def measure(name: str, engine_name: str, times: int, scratch: Path) -> dict[str, Any]:
    """One row: medians over `times` swaps."""
    source = random_model(name, scratch / "model")
    tensors = {key: tensor.clone() for key, tensor in tensors_of(source)}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    floor_s = memcpy_s(tensors, times)
    engine = open_engine(
        engine_name, folder=source, stop_ids=(2,), loader=Loader(source),
        max_inflight=4, memory_fraction=0.3,
    )
    prompt, pauses, publishes, ways = np.arange(3, 11, dtype=np.int32), [], [], []
    for n in range(times):
        for tensor in tensors.values():
            tensor.mul_(1.001)
        engine.abort()
        engine.admit([Request(id=f"{n}.{i}", prompt_ids=prompt, seed=(n, i), max_new=200) for i in range(4)])
        engine.step()
        started = time.perf_counter()
        manifest = publish("b", "b", n, tensors, source, scratch / "weights", keep=2, fsync=False)
        published = time.perf_counter()
        engine.prepare(manifest, scratch / "weights")  # a service does this in a thread of its own, while answers go on
        swapped = engine.swap_in(manifest, scratch / "weights")
        ways.append(time.perf_counter() - started)
        assert swapped.inflight, "nothing was in flight"
        pauses.append(swapped.pause_s)
        publishes.append(published - started)
        engine.step()
    row = {"memcpy_s": floor_s, "pause_s": median(pauses), "publish_s": median(publishes), "way_s": median(ways)}
    return {"model": name, "engine": engine_name, "mb": round(nbytes / 1e6, 1)} | {key: round(value, 5) for key, value in row.items()} | {
        "memcpy_gb_per_s": round(nbytes / floor_s / 1e9, 2), "pause / memcpy": round(row["pause_s"] / floor_s, 2),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    arguments.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    arguments.add_argument("--times", type=int, default=5)
    arguments.add_argument("--out", type=Path)
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine(), "times": asked.times, "rows": []}
    for name in asked.models:
        with tempfile.TemporaryDirectory() as scratch:
            result["rows"].append(measure(name, asked.engine, asked.times, Path(scratch)))
        print(json.dumps(result["rows"][-1]), flush=True)
        store(asked.out or Path(f"benchmarks/results/swap_{asked.engine}.json"), result)


if __name__ == "__main__":
    main()
