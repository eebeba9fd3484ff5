"""Low-rank adapters on the way: published alone, merged over the base where they are served.

W + scale · B · A for each adapted weight (arXiv 2106.09685). Names and files are PEFT's, so that any PEFT opens the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch
import xxhash
from msgspec import Struct
from safetensors import safe_open

from streamopd.errors import SwapRefused
from streamopd.schemas import Weights

from .digest import digest

PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


class Form(Struct, frozen=True, kw_only=True):
    """What a folder of adapters says beside its tensors."""

    base: Path               # the HF folder that they are added to
    rank: int
    alpha: float
    target_modules: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def peft_config(self) -> dict[str, object]:
        """adapter_config.json."""
        return {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(self.base), "r": self.rank,
            "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": list(self.target_modules),
            "inference_mode": True,
        }


def merged(adapters: Mapping[str, torch.Tensor], manifest: Weights, base: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of the base by its HF name, the adapted ones with their product added in float32, all in `dtype`.

    SwapRefused when the adapters were made over another base, or speak of what the base does not have.
    """
    if manifest.base != (here := base_digest(base)):
        raise SwapRefused(
            f"Weights {manifest.n} are adapters over a base of digest {manifest.base}; {base} has {here}. "
            "Give every service of the run the same student.model."
        )
    left = {name.removeprefix(PREFIX).removesuffix(A) for name in adapters if name.endswith(A)}
    whole = {}
    for name, tensor in tensors_of(base):
        stem = name.removesuffix(".weight")
        if stem in left:
            left.remove(stem)
            tensor = tensor.float() + adapters[PREFIX + stem + B].float() @ adapters[PREFIX + stem + A].float() * manifest.scale
        whole[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if left:
        raise SwapRefused(f"Weights {manifest.n} adapt {sorted(left)[0]}, which {base} does not have ({len(left)} such).")
    return whole


def tensors_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of an HF folder, as maps of its pages."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                yield name, opened.get_tensor(name)


@cache
def base_digest(folder: Path) -> str:
    """xxh3-128 over names and digests of a folder's tensors."""
    return xxhash.xxh3_128_hexdigest("\n".join(f"{name} {digest(tensor)}" for name, tensor in tensors_of(folder)).encode())
