"""The command line: `streamopd run RECIPE`, each service by its name, and ways to look at a run."""

from __future__ import annotations

from .main import main

__all__ = ["main"]
