"""New weights: a manifest, never tensors."""

from __future__ import annotations

from msgspec import Struct


class TensorInfo(Struct, array_like=True, frozen=True):
    """One tensor of a safetensors file."""

    name: str
    dtype: str               # as torch names it, "float32"
    shape: tuple[int, ...]
    digest: str              # xxh3-128 of its bytes, hex


class Weights(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """Weights `n` of one boot, in `folder` under the run's weights directory. Written after the files it names."""

    run: str
    boot: str
    n: int                   # version = number of optimizer steps done
    folder: str              # "weight_v000012"
    kind: str = "full"       # full | lora: adapters alone, to be merged over the student's base
    base: str = ""           # lora: digest of that base
    scale: float = 0.0       # lora: of the product B · A
    nbytes: int = 0
    born_s: float = 0.0
    tensors: list[TensorInfo] = []
    stage: int = 0           # the method's, at least: those before it have ended on a plateau
