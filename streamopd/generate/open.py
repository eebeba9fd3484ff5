"""Engines by the name that `generator.engine` gives them; torch is imported only when one needs it."""

from __future__ import annotations

from typing import Any

from streamopd.errors import ConfigError

from .engine import Engine

SCRIPTED = ("folder", "stop_ids", "max_inflight", "temperature", "top_p", "student_k", "vocab_size", "token_s")


def open_engine(kind: str, **values: Any) -> Engine:
    """The engine called `kind`; `values` are the arguments of HFEngine, of which a scripted one needs a few.

    ConfigError names the kinds there are.
    """
    if kind == "hf":
        from .hf import HFEngine

        return HFEngine(**values)
    if kind == "scripted":
        from .scripted import ScriptedEngine

        return ScriptedEngine(**{name: value for name, value in values.items() if name in SCRIPTED})
    raise ConfigError(f"generator.engine = {kind!r} is not one of 'hf', 'scripted'.")
