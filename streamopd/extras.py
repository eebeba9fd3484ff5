"""Code that only some runs need: packages of an extra, and a user's own files. Loaded when asked for, or refused in words."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from streamopd.errors import ConfigError


def need(module: str, extra: str, wanted_by: str) -> ModuleType:
    """The module. ConfigError names what wanted it and the extra that brings it."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:  # it is there, but something that it needs is not
            raise
        raise ConfigError(
            f"{wanted_by} needs the package {package.replace('_', '-')}, which is not installed. "
            f"Install it with: pip install 'streamopd[{extra}]'"
        ) from None


def from_file(reference: str, key: str) -> Any:
    """The value NAME of a user's own file, given as "path/to/file.py:NAME". `key` is the setting that names it."""
    path, _, name = reference.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{key} = {reference} names a file that is not there: {file.absolute()}")
    spec = importlib.util.spec_from_file_location(f"streamopd_user_{file.stem}", file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        there = ", ".join(known for known in vars(module) if not known.startswith("_"))
        raise ConfigError(f"{key} = {reference}, but the file has no {name!r}. It has: {there or 'nothing'}.")
    return getattr(module, name)
