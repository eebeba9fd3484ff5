"""What the stream costs: the quickstart as processes over Valkey, in one process, and as the plain loop; one after another.

    python -m benchmarks.stream_cost [--steps 500] [--seed 0] [--median-of 1] [--out benchmarks/results/stream_cost.json]

Prints wall seconds, own CPU-seconds (of the process and its children) and the load of others beside each run. The plain
loop writes one answer at a time without a cache, so it is timed over few steps, from inside, and stated per step: it is an
oracle, not a rival.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.clock import ENVIRONMENT, load_average, machine, run_command, store, timed

PLAIN = """
import json, sys, time
from streamopd import config
from streamopd.assets import resolve
from tests.plain_loop import plain_loop
steps, seed = int(sys.argv[1]), sys.argv[2]
c, _ = config.load("quickstart", ["seed=" + seed])
models = resolve(c.student.model), resolve(c.teachers["default"].model)
plain_loop(c, *models, 0)  # whatever is imported late is imported now
wall_s, cpu_s = time.monotonic(), time.process_time()
plain_loop(c, *models, steps)
wall_s, cpu_s = time.monotonic() - wall_s, time.process_time() - cpu_s
print(json.dumps({"s_per_step": round(wall_s / steps, 2), "cpu_s_per_step": round(cpu_s / steps, 2)}))
"""
Measure = Callable[[Path], dict[str, Any]]


def plain_loop(steps: int, seed: int) -> dict[str, Any]:
    """Seconds a step of the plain loop, without its start."""
    load, command = load_average(), [sys.executable, "-c", PLAIN, str(steps), str(seed)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | ENVIRONMENT).stdout
    return {**json.loads(told.splitlines()[-1]), "load_average_before": load}


def measures(steps: int, plain_steps: int, seed: int) -> dict[str, Measure]:
    """What is measured, by name; each takes a folder of its own."""
    settings = [f"learn.max_steps={steps}", f"seed={seed}", "evaluate.enabled=false"]

    def quickstart(*more: str, flags: tuple[str, ...] = ()) -> Measure:
        return lambda folder: timed(run_command("quickstart", folder, [*settings, *more], *flags))

    return {
        "processes, max_staleness 4": quickstart(),
        "processes, max_staleness 0": quickstart("max_staleness=0"),
        "in one process": quickstart(flags=("--in-process",)),
        f"plain loop, {plain_steps} steps": lambda folder: plain_loop(plain_steps, seed),
    }


def measured(kinds: dict[str, Measure], times: int) -> list[dict[str, Any]]:
    """One row a kind: the median of `times` rounds, of each figure by itself."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for _ in range(times):
        for name, measure in kinds.items():
            with tempfile.TemporaryDirectory() as scratch:
                found[name].append(measure(Path(scratch) / "run"))
            print({"name": name, **found[name][-1]}, flush=True)
    return [{"name": name, **_median(rows)} for name, rows in found.items()]


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    figures = {key: round(median(row[key] for row in rows), 2) for key in rows[0] if key != "load_average_before"}
    return figures | {"load_average_before": [row["load_average_before"] for row in rows]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=500)
    arguments.add_argument("--plain-steps", type=int, default=3)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--median-of", type=int, default=1, help="rounds")
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results/stream_cost.json"))
    asked = arguments.parse_args()
    about = {"machine": machine(), "steps": asked.steps, "seed": asked.seed, "median of": asked.median_of}
    rows = measured(measures(asked.steps, asked.plain_steps, asked.seed), asked.median_of)
    ratios = {
        "cpu: processes / in one process": round(rows[0]["cpu_s"] / rows[2]["cpu_s"], 3),
        "wall: max_staleness 0 / 4": round(rows[1]["wall_s"] / rows[0]["wall_s"], 3),
    }
    store(asked.out, about | {"rows": rows, "ratios": ratios})
    print(json.dumps(ratios, indent=1))
    print(f"plain loop: {rows[3]['s_per_step']} s a step")


if __name__ == "__main__":
    main()
