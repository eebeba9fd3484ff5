"""A tensor's fingerprint: xxh3-128 of its raw bytes, so that every dtype is hashed the same way."""

from __future__ import annotations

import torch
import xxhash

from streamopd.schemas import TensorInfo


def digest(tensor: torch.Tensor) -> str:
    """Hex xxh3-128 of the tensor's bytes in C order; no copy when it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return xxhash.xxh3_128_hexdigest(flat.view(torch.uint8).numpy().data)


def describe(name: str, tensor: torch.Tensor) -> TensorInfo:
    """Name, dtype, shape and digest of `tensor`."""
    return TensorInfo(name, dtype_name(tensor.dtype), tuple(tensor.shape), digest(tensor))


def dtype_name(dtype: torch.dtype) -> str:
    """As torch names it, without the module: "float32"."""
    return str(dtype).removeprefix("torch.")
