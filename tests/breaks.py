"""Deliberate breaks: each is one change to a copy of the project, and the test that must then be red.

    python -m tests.breaks            applies them all, says what turned red
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from msgspec import Struct

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "models", ".*_cache", "__pycache__", ".hypothesis", "dist", "build")


class Break(Struct, frozen=True):
    """Replace `old` by `new` in `file`; `test` must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


BREAKS = [
    Break(
        "shift by one", "streamopd/layout.py", "width + prompts - 1", "width + prompts - 2",
        "tests/learn/test_trainer.py::test_the_gradient_is_that_of_a_plain_forward_kl_over_each_answer_alone",
    ),
    Break(
        "tail dropped", "streamopd/learn/objective/cells.py", 'if remainder == "drop":', 'if remainder in ("drop", "tail"):',
        "tests/learn/test_objective.py::test_any_partition_gives_the_brute_force_value_and_slope",
    ),
    Break(
        "normaliser per micro-batch", "streamopd/learn/trainer.py", ".sum() / total", ".sum() / len(micro.at)",
        "tests/learn/test_every_method.py::test_the_gradient_does_not_depend_on_how_a_step_is_cut[default]",
    ),
    Break(
        "swap ignored", "streamopd/generate/hf.py", "self._coming.loader.load(self.model, manifest, fresh)", "pass",
        "tests/generate/test_hf_engine.py::test_answers_across_swaps_replay_by_the_rule_their_spans_state",
    ),
    Break(
        "ack before checkpoint", "streamopd/learn/lineage.py",
        "        self._save(done=False)\n        known =",
        "        await self.broker.commit(self.boot, self.number, (self.number, self.n), list(others))\n"
        "        self._save(done=False)\n        known =",
        "tests/learn/test_lineage.py::test_a_learner_killed_at_any_call_replays_what_it_can",
    ),
    Break(
        "fate written twice", "streamopd/stream/memory.py",
        "same = self._life.state.get(entry.seq) == (entry.attempt, entry.stage)", "same = True",
        "tests/stream/test_histories.py::test_every_run_in_memory_ends_by_itself_with_exact_accounts",
    ),
    Break(
        "window counted from checkpoints", "streamopd/stream/memory.py",
        "limits, flight = self.limits, self._life.issued - self._life.fated",
        'limits, flight = self.limits, self._life.issued - self._life.fated + list(self._life.fates.values()).count("trained")',
        "tests/stream/test_histories.py::test_every_run_in_memory_ends_by_itself_with_exact_accounts",
    ),
    Break(
        "fates written before the weights are published", "streamopd/learn/lineage.py",
        "self.broker.step(self.boot, self.number, self.n, manifest, named)",
        "self.broker.step(self.boot, self.number, self.n, None, named)",
        "tests/learn/test_lineage.py::test_a_learner_killed_at_any_call_trains_each_group_once",
    ),
    Break(
        "a batch trained at another n", "streamopd/learn/lineage.py",
        "entry = await self.broker.batch(self.n, consumer, block_s)",
        "entry = await self.broker.batch(max(0, self.n - 1), consumer, block_s)",
        "tests/learn/test_lineage.py::test_a_learner_killed_at_any_call_trains_each_group_once",
    ),
]


def turns_red(broken: Break, folder: Path) -> bool:
    """Apply a break to a copy in `folder` and run its test there: whether it fails (and was there to fail)."""
    copy = folder / "copy"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=LEFT_OUT)
    file = copy / broken.file
    file.write_text(file.read_text().replace(broken.old, broken.new))
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout=100", broken.test],
        cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True, check=False,
    )
    assert answer.returncode in (0, 1), answer.stdout + answer.stderr
    return answer.returncode == 1


def main() -> int:
    missed = 0
    for broken in BREAKS:
        with tempfile.TemporaryDirectory() as folder:
            red = turns_red(broken, Path(folder))
        missed += not red
        print(f"{'red' if red else 'MISSED':7} {broken.name}: {broken.test}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
