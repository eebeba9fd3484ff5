"""The swap drill: before the first answer, prove that an engine serves what is swapped in, decode path included.

Visibly perturbed weights are published, swapped in through the engine's own door, and the engine's log-probs of a
probe are compared with a plain forward of the same folder that shares no code with the engine. Then the same for the
source's own weights. At real learning rates a swap moves log-probs by less than rounding does, so only a drill with
large changes can see an engine that, say, keeps its old output head.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from streamopd.errors import SwapRefused
from streamopd.schemas import Weights

from .publish import publish

PERTURBED, RESTORED = -2, -1   # versions that no run publishes: after the drill an engine serves none of a run's
NOISE = 0.2                    # of each tensor's root mean square
ROUNDING = {"float32": 1e-3, "bfloat16": 0.1}   # nats between the decode path and a plain float32 forward
SHARE = {"float32": 0.0, "bfloat16": 0.15}      # ... or this share of the change, since rounding grows with logits
PROBE_LENGTH = 12
SEED = 20240607


class Swappable(Protocol):
    """What the drill needs of an engine."""

    def swap_in(self, manifest: Weights, weights_dir: Path) -> object: ...
    def probe(self, ids: list[int]) -> NDArray[np.float32]: ...


class Drill(Struct, frozen=True):
    """What the drill saw, in nats."""

    moved: float           # the largest change of a probe's log-prob under the perturbed weights
    error: float           # the largest distance between the engine and the plain forward
    seconds: float


def drill(engine: Swappable, source: Path, weights_dir: Path, run: str, dtype: str = "float32") -> Drill:
    """Swap perturbed weights into `engine` and `source`'s own back; SwapRefused, naming both numbers, if it lies.

    `dtype` is what the engine serves. The engine must have nothing in flight. Folders are made under `weights_dir`,
    on the disk that the run's own swaps use, and removed; where only the learner may write there, among temporary files.
    """
    started = time.perf_counter()
    tensors, ids = _read(source, dtype)
    writable = os.access(weights_dir, os.W_OK)
    with tempfile.TemporaryDirectory(prefix=".drill-", dir=weights_dir if writable else None) as scratch:
        folder = Path(scratch)
        there = publish(run, "drill", PERTURBED, _perturbed(tensors), source, folder, keep=2, fsync=False)
        back = publish(run, "drill", RESTORED, tensors, source, folder, keep=2, fsync=False)
        shifted, expected = (_plain_logprobs(folder / weights.folder, ids) for weights in (there, back))
        engine.swap_in(there, folder)
        served = engine.probe(ids)
        engine.swap_in(back, folder)
        restored = engine.probe(ids)
    moved = float(np.abs(shifted - expected).max())
    assert moved > 3 * ROUNDING[dtype], f"noise of {NOISE} moved the plain forward by {moved} nats only"
    allowed = max(ROUNDING[dtype], SHARE[dtype] * moved)
    error = max(
        _require_near(served, shifted, allowed, "perturbed weights were swapped in"),
        _require_near(restored, expected, allowed, "the source's own weights were swapped back"),
    )
    return Drill(moved=moved, error=error, seconds=time.perf_counter() - started)


def _read(source: Path, dtype: str) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The source's tensors as `dtype`, a tied one once, and the ids to probe with."""
    model = _open_plain(source, dtype)
    by_storage: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        by_storage.setdefault(tensor.data_ptr(), name)
    state = model.state_dict()
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = np.random.default_rng(SEED).integers(0, vocab, PROBE_LENGTH).tolist()
    return {name: state[name] for name in by_storage.values()}, ids


def _perturbed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    shaken = {}
    for name, tensor in tensors.items():
        scale = NOISE * float(tensor.float().square().mean().sqrt()) or NOISE  # a tensor of zeros moves too
        shaken[name] = tensor + scale * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    return shaken


@torch.inference_mode()
def _plain_logprobs(folder: Path, ids: list[int]) -> NDArray[np.float32]:
    """Log-probs of ids[1:] by one forward in float32 without a cache."""
    model = _open_plain(folder, "float32")
    logp = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
    picked: NDArray[np.float32] = logp.gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1).numpy()
    return picked


def _open_plain(folder: Path, dtype: str) -> PreTrainedModel:
    disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True
    )
    return model.eval()


def _require_near(served: NDArray[np.float32], plain: NDArray[np.float32], allowed: float, when: str) -> float:
    error = np.abs(served - plain)
    at = int(error.argmax())
    if not error[at] <= allowed:  # also when it is not a number
        raise SwapRefused(
            f"The swap drill failed. After {when}, the engine gives probe token {at + 1} a log-prob of "
            f"{served[at]:.4f}; a plain forward of the same folder gives {plain[at]:.4f}, and {allowed:.3g} between "
            "them is allowed.\n"
            "The engine does not serve what it is given, so nothing it writes could be trusted. Use generator.engine = "
            "\"hf\", or report this engine."
        )
    return float(error[at])
