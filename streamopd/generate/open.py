"""Engines by the name that `generator.engine` gives them; torch is imported only when one needs it."""

from __future__ import annotations

from typing import Any

from streamopd.errors import ConfigError
from streamopd.extras import need

from .engine import Engine

HF = (
    "folder", "stop_ids", "loader", "max_inflight", "pad_id", "temperature", "top_p", "student_k", "kv", "dtype",
    "teacher", "teacher_dtype",
)
VLLM = ("folder", "stop_ids", "loader", "max_inflight", "temperature", "top_p", "student_k", "kv", "dtype", "memory_fraction", "sleeps")
SCRIPTED = ("folder", "stop_ids", "max_inflight", "temperature", "top_p", "student_k", "vocab_size", "token_s")


def open_engine(kind: str, **values: Any) -> Engine:
    """The engine called `kind`, from those of `values` that it takes.

    ConfigError names the kinds there are.
    """
    if kind == "hf":
        from .hf import HFEngine

        return HFEngine(**_of(values, HF))
    if kind == "vllm":
        need("vllm", "vllm", 'generator.engine = "vllm"')
        from .vllm import VllmEngine

        return VllmEngine(**_of(values, VLLM))
    if kind == "scripted":
        from .scripted import ScriptedEngine

        return ScriptedEngine(**_of(values, SCRIPTED))
    raise ConfigError(f"generator.engine = {kind!r} is not one of 'hf', 'vllm', 'scripted'.")


def _of(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}
