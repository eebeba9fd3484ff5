"""Methods by name. One file a method; adding one edits nothing else. `about/` says what they are and need."""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches

from streamopd.errors import ConfigError
from streamopd.extras import from_file
from streamopd.slots import Method


def names() -> list[str]:
    """The names that `method = ...` takes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def load(name: str) -> Method:
    """The method called `name`, or the value `NAME` of a user's own file as "path/to/file.py:NAME"."""
    if ".py:" in name:
        return _from_file(name)
    if name.endswith(".py"):
        raise ConfigError(f"method = {name} names a file; a file may hold several methods: write {name}:NAME.")
    if name not in names():
        near = get_close_matches(name, names(), 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(names())}."
        raise ConfigError(f"There is no method {name!r}. {hint}")
    return _only_method(importlib.import_module(f"{__name__}.{name}"), name)


def _from_file(name: str) -> Method:
    try:
        method = from_file(name, "method")
    except (ValueError, TypeError, NameError, AttributeError, ImportError, SyntaxError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"method = {name}: {error}") from error
    if not isinstance(method, Method):
        raise ConfigError(f"method = {name} is a {type(method).__name__}; it must be a streamopd.slots.Method.")
    return method


def _only_method(module: object, name: str) -> Method:
    found = [value for value in vars(module).values() if isinstance(value, Method)]
    assert len(found) == 1, f"methods/{name}.py must hold exactly one Method, it holds {len(found)}"
    return found[0]
