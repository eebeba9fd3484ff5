"""Ten methods and three baselines on the quickstart's task, with one budget of answers: what each makes of it.

    python -m benchmarks.methods_ab [--methods default opd] [--seeds 0 1 2] [--steps 150] [-s learn.lr=1e-3]
                                    [--out benchmarks/results/methods_ab.json] [--page docs/methods_ab.md]
    python -m benchmarks.methods_ab --page-only        # the table again, from what is stored

Every run is `streamopd run recipes/quickstart.toml --in-process`, two at a time. A step is 64 answers for all: a method that
compares answers to one prompt gets 8 prompts × 8 answers, the others 64 × 1. The learning rate is the quickstart's, which was
found with `forward_kl`, and a fifth of it where the signal is the reward of a sampled token, without a baseline from the teacher:
at the whole of it those diverge within 60 steps. Nothing else is tuned, so the table says what a method does at this rate on
this task, not which is the best. A run that fails is a row with its sentence.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.clock import ENVIRONMENT, load_average, machine, run_command, store
from benchmarks.seeds import Figures, account, compared
from streamopd.methods import load

METHODS = ("default", "forward_kl", "gkd", "opd", "vopd", "eopd", "aopd", "lsm", "kdrl", "taid")
BASELINES = ("sft", "seqkd", "grpo")
RECIPE = Path("recipes/quickstart.toml")
RATE = 1.5e-3
LOWER = {"opd": 3e-4, "kdrl": 3e-4, "grpo": 3e-4}
ANSWERS, GROUP = 64, 8  # a step; answers to one prompt where they are compared
SIDE_BY_SIDE = 2
LONGEST_S = 3600.0
LEARNED = ("accuracy_greedy", "accuracy_sampled", "kl_teacher_student", "kl_student_teacher")
COLUMNS = {
    "accuracy_greedy": "accuracy, greedy", "accuracy_sampled": "accuracy, sampled", "kl_teacher_student": "KL(teacher‖student)",
    "kl_student_teacher": "KL(student‖teacher)",
}


def settings(name: str, seed: int, steps: int) -> list[str]:
    """What a run of this method is told beside the recipe."""
    group = GROUP if load(name).least_group > 1 else 1
    groups = [f"group_size={group}", f"learn.groups_per_step={ANSWERS // group}"] if group > 1 else []
    return [f"method={name}", f"seed={seed}", f"learn.max_steps={steps}", f"learn.lr={LOWER.get(name, RATE)}", *groups]


def run_one(name: str, seed: int, steps: int, more: Sequence[str]) -> Figures:
    """One row: what came of the run, or why nothing did."""
    row: Figures = {"method": name, "seed": seed}
    began_s, load_before = time.monotonic(), load_average()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        try:
            row["settings"] = [*settings(name, seed, steps), *more]
            command = run_command(str(RECIPE), folder, row["settings"], "--in-process")
            ended = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=LONGEST_S, check=False)
        except (ValueError, subprocess.TimeoutExpired) as error:  # an unknown method is a user's mistake: ours says which
            return row | {"failed": str(error)}
        row |= {"wall_s": round(time.monotonic() - began_s, 1), "load_average_before": load_before}
        summary = folder / "summary.json"
        if ended.returncode or not summary.is_file():
            return row | {"failed": _last_words(ended.stderr or ended.stdout) or f"exit status {ended.returncode}"}
        return row | figures(json.loads(summary.read_text()))


def figures(summary: dict[str, Any]) -> Figures:
    """A run's own account, and what was learned."""
    tokens = {"generated": summary["tokens_generated"], "trained": summary["tokens_trained"]}
    return {**account(summary), "tokens": tokens, **compared(summary, *LEARNED)}


def run_all(names: Sequence[str], seeds: Sequence[int], steps: int, more: Sequence[str], out: Path) -> dict[str, Any]:
    """Seed after seed, so that an interrupted benchmark has all methods; each row is stored as soon as it is there."""
    result: dict[str, Any] = {
        "command": [Path(sys.executable).name, "-m", "benchmarks.methods_ab", *sys.argv[1:]], "machine": machine(),
        "recipe": str(RECIPE), "steps": steps, "answers_per_step": ANSWERS, "methods": list(names), "seeds": list(seeds),
        "settings": list(more), "rows": [],
    }
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for row in pool.map(lambda job: run_one(job[1], job[0], steps, more), [(seed, name) for seed in seeds for name in names]):
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            store(out, result)
    return result


# ---------------------------------------------------------------- the page
def page(result: dict[str, Any]) -> str:
    """The table, a row a method, failures too; and every run below it."""
    one: Figures = next((row for row in result["rows"] if "accuracy_greedy" in row), {})
    known = {who: [_figure(one.get(name, {}).get(who)) for name in LEARNED] for who in ("before", "teacher")}
    head = ["method", "evidence", "rate", *COLUMNS.values(), "tokens trained", "wall", "runs"]
    lines = [
        _row(head), _row(["---"] * len(head)),
        _row(["*student before*", "", "", *known["before"], "", "", ""]), _row(["*teacher*", "", "", *known["teacher"], "", "", ""]),
        *(_row(_summed(name, [row for row in result["rows"] if row["method"] == name])) for name in result["methods"]),
    ]
    runs_head = ["method", "seed", *COLUMNS.values(), "tokens trained", "wall", "what became of it"]
    runs = [_row(runs_head), _row(["---"] * len(runs_head)), *(_row(_told(row)) for row in result["rows"])]
    return "\n".join([
        "# Methods side by side", "",
        f"The quickstart's task, {result['steps']} steps × {result['answers_per_step']} answers, "
        f"seeds {', '.join(map(str, result['seeds']))}: mean of the runs that ended (lowest … highest). "
        f"Written by `{' '.join(result['command'])}` on {result['machine']['cpu']}, "
        f"{result['machine']['cores']} cores, two runs at a time.", "",
        "The learning rate is the quickstart's, which was found with `forward_kl`, and a fifth of it for policy gradients of sampled "
        "tokens without a baseline, which diverge at the whole of it. Nothing else is tuned: this is what each does here, and no "
        "ranking of their best. Divergences are in nats a token on held-out prompts.", "", *lines, "", "## Every run", "", *runs, "",
    ])


def _summed(name: str, rows: Sequence[Figures]) -> list[str]:
    ended = [row for row in rows if "failed" not in row]
    columns = [_spread([row[column]["after"] for row in ended if "after" in row.get(column, {})]) for column in LEARNED]
    tokens, wall = ([row[key] for row in ended] for key in ("tokens", "wall_s"))
    failures = sorted({row["failed"] for row in rows if "failed" in row})
    came = f"{len(ended)} of {len(rows)}" + "".join(f"; failed: {_cell(failure)}" for failure in failures)
    trained = f"{sum(t['trained'] for t in tokens) / len(tokens) / 1000:.0f} k" if tokens else "–"
    wall_told = f"{sum(wall) / len(wall):.0f} s" if wall else "–"
    return [f"`{name}`", _evidence(name), _rate(rows), *columns, trained, wall_told, came]


def _rate(rows: Sequence[Figures]) -> str:
    """The learning rate that the runs were told, the last one where it was told twice."""
    told = {next((s.partition("=")[2] for s in reversed(row.get("settings", [])) if s.startswith("learn.lr=")), "–") for row in rows}
    return " / ".join(sorted(told)) or "–"


def _told(row: Figures) -> list[str]:
    came = f"failed: {_cell(row['failed'])}" if "failed" in row else f"{row['status']}, {row['steps']} steps"
    learned = [_figure(row.get(column, {}).get("after")) for column in LEARNED]
    tokens = f"{row['tokens']['trained'] / 1000:.0f} k" if "tokens" in row else "–"
    return [f"`{row['method']}`", str(row["seed"]), *learned, tokens, f"{row['wall_s']:.0f} s" if "wall_s" in row else "–", came]


def _evidence(name: str) -> str:
    try:
        return load(name).evidence_level
    except ValueError:
        return "–"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = _figure(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({_figure(min(values))} … {_figure(max(values))})"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    """A sentence that does not break the table."""
    return " ".join(text.split()).replace("|", "\\|")[:300]


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[-3:])


def _asked() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--methods", nargs="+", default=[*METHODS, *BASELINES])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--steps", type=int, default=150)
    arguments.add_argument("-s", "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    arguments.add_argument("--out", type=Path, default=Path("benchmarks/results/methods_ab.json"))
    arguments.add_argument("--page", type=Path, default=Path("docs/methods_ab.md"))
    arguments.add_argument("--page-only", action="store_true")
    return arguments.parse_args()


if __name__ == "__main__":
    asked = _asked()
    stored = json.loads(asked.out.read_text()) if asked.page_only else run_all(
        asked.methods, asked.seeds, asked.steps, asked.settings, asked.out
    )
    asked.page.write_text(page(stored))
