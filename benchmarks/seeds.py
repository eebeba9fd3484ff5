"""A recipe run for several seeds, one after another; each seed's figures are stored as soon as they are there."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.clock import machine, run_command, store, timed

Figures = dict[str, Any]
Pick = Callable[[dict[str, Any], Path], Figures]  # (summary.json, run folder) -> what is told of a seed


def run_seeds(recipe: str, seeds: Sequence[int], settings: Sequence[str], out: Path, pick: Pick) -> None:
    """Run, pick, print and store; the run folders are thrown away."""
    result: dict[str, Any] = {"machine": machine(), "recipe": recipe, "settings": list(settings), "seeds": []}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "run"
            clock = timed(run_command(recipe, folder, [f"seed={seed}", *settings]))
            row = {"seed": seed, **clock, **pick(json.loads((folder / "summary.json").read_text()), folder)}
        result["seeds"].append(row)
        print(json.dumps(row, indent=1), flush=True)
        store(out, result)


def asked_for(about: str | None, seeds: Sequence[int], out: str) -> argparse.Namespace:
    """`seeds`, `settings` and `out` of the command line."""
    arguments = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    arguments.add_argument("-s", "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results") / out)
    return arguments.parse_args()


def account(summary: dict[str, Any]) -> Figures:
    """What every run must be able to say of itself."""
    return {
        "status": summary["status"],
        "steps": summary["steps"],
        "startup_s": summary["startup_s"],
        "groups": {
            "fed": summary["groups_fed"], "trained": summary["groups_trained"], "dropped": summary["groups_dropped"],
            "duplicate_trainings": summary["duplicate_trainings"],
        },
        "swaps": summary["swaps"],
        "age_steps": {name: summary["age_steps"][name] for name in ("mean", "max")},
        "learner_idle_fraction": summary["learner_idle_fraction"],
    }


def compared(summary: dict[str, Any], *names: str) -> Figures:
    """Held-out figures before, after and of the teacher, rounded; a figure that nobody has is left out."""
    return {
        name: {who: round(value, 4) for who, value in summary["eval"][name].items() if value is not None}
        for name in names
        if name in summary["eval"]
    }
