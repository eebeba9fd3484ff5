"""One array on the wire: dtype, shape and raw little-endian bytes; decoding is a view, never a list."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

DTYPES = ("bool", "int32", "int64", "float16", "float32", "float64")
MAX_ITEMS = 1 << 28  # 1 GiB of float32: more than any record may hold


class Array(Struct, array_like=True, frozen=True):
    """A numpy array as a message field. `data` holds `prod(shape)` little-endian items of `dtype`, C order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"array dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if any(n < 0 for n in self.shape) or prod(self.shape) > MAX_ITEMS:
            raise ValueError(f"array shape {self.shape} is negative or larger than {MAX_ITEMS} items")
        expected = prod(self.shape) * np.dtype(self.dtype).itemsize
        if len(self.data) != expected:
            raise ValueError(f"array {self.dtype}{list(self.shape)} needs {expected} bytes, got {len(self.data)}")

    @classmethod
    def of(cls, values: Any, dtype: str) -> Array:
        """Pack `values` (array-like) as `dtype`."""
        array = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
        return cls(dtype, array.shape, array.tobytes())

    def numpy(self) -> NDArray[Any]:
        """A read-only numpy view of the bytes."""
        return np.frombuffer(self.data, dtype=np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape)

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0


def refuse_impossible(logprobs: Array, what: str, padding: bool = False) -> None:
    """ValueError when a log-prob is NaN, above 0, or -inf where nothing is padded (0.01 nats of rounding are forgiven)."""
    values = logprobs.numpy()
    if values.dtype.kind != "f":
        raise ValueError(f"{what} are {logprobs.dtype}, not floating point")
    if values.size == 0:
        return
    highest, lowest = values.max(), values.min()  # NaN in, NaN out
    if not highest <= 0.01 or (lowest == -np.inf and not padding):
        raise ValueError(f"{what} range from {lowest} to {highest}; a log-prob is finite and at most 0")
