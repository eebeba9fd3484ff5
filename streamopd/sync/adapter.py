"""Low-rank adapters on the way: published alone, merged over the base where they are served.

W + scale · B · A for each adapted weight (arXiv 2106.09685). Names and files are PEFT's, so that any PEFT opens the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import torch
import xxhash
from msgspec import Struct
from safetensors import safe_open

from streamopd.errors import SwapRefused, UserError
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
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(self.base.resolve()), "r": self.rank,
            "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": list(self.target_modules),
            "inference_mode": True,
        }


def merged(adapters: Mapping[str, torch.Tensor], manifest: Weights, base: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of the base by its HF name, the adapted ones with their product added in float32, all in `dtype`.

    SwapRefused when the adapters were made over another base, are incomplete, or speak of what the base does not have.
    """
    if manifest.base != (here := base_digest(base)):
        raise SwapRefused(
            f"Weights {manifest.n} are adapters over a base of digest {manifest.base}; {base} has {here}. "
            "Give every service of the run the same student.model."
        )
    left = _pairs(adapters, manifest.n)
    whole = {}
    for name, tensor in tensors_of(base):
        if (pair := left.pop(name.removesuffix(".weight"), None)) is not None:
            down, up = pair
            if (up.shape[0], down.shape[1]) != tuple(tensor.shape) or up.shape[1] != down.shape[0]:
                raise SwapRefused(
                    f"Weights {manifest.n}: {name} is {list(tensor.shape)}, its adapters are {list(up.shape)} and {list(down.shape)}."
                )
            tensor = tensor.float() + up.float() @ down.float() * manifest.scale
            if not torch.isfinite(tensor).all():
                raise SwapRefused(f"Weights {manifest.n}: {name} holds what is no finite number once its adapters are added.")
        whole[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if left:
        raise SwapRefused(f"Weights {manifest.n} adapt {sorted(left)[0]}, which {base} does not have ({len(left)} such).")
    return whole


def _pairs(adapters: Mapping[str, torch.Tensor], n: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) by the module that they belong to; every name is part of a pair."""
    stems = {name.removeprefix(PREFIX).removesuffix(A) for name in adapters if name.startswith(PREFIX) and name.endswith(A)}
    odd = sorted(set(adapters) ^ {PREFIX + stem + end for stem in stems for end in (A, B)})
    if odd:
        raise SwapRefused(f"Weights {n}: {odd[0]} is not one of a pair of adapters that can be added to a weight ({len(odd)} such).")
    return {stem: (adapters[PREFIX + stem + A], adapters[PREFIX + stem + B]) for stem in stems}


def require_servable(adapters: Mapping[str, torch.Tensor], base: Path) -> None:
    """UserError when what is trained could be added to no file of the base: said before the first step, not at the first swap."""
    names, stems = {name for name, _ in tensors_of(base)}, _pairs(adapters, 0)
    missing = sorted(stem for stem in stems if f"{stem}.weight" not in names)
    if missing:
        raise UserError(
            f"The adapters of {missing[0]} ({len(missing)} such) cannot be served: {base} calls its tensors otherwise, {min(names)} "
            "for one. Save it again with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )


def tensors_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of an HF folder, as maps of its pages."""
    for file in _files(folder):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                yield name, opened.get_tensor(name)


def _files(folder: Path) -> list[Path]:
    """Those that transformers would load; a folder may hold the same weights in other forms too."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def base_digest(folder: Path) -> str:
    """xxh3-128 over names and digests of a folder's tensors; read again when a file changed."""
    files = _files(folder)
    return _digest(folder, tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ino) for file in files))


@lru_cache(maxsize=4)
def _digest(folder: Path, files: tuple[tuple[str, int, int, int], ...]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(f"{name} {digest(tensor)}" for name, tensor in tensors_of(folder)).encode())
