"""The quickstart for five seeds, and what plain transformers makes of each result.

    python -m benchmarks.quickstart_seeds [--seeds 0 1 2 3 4] [--out benchmarks/results/quickstart_seeds.json]

Beside the run's own account: `fresh_accuracy_greedy`, of final/ loaded by plain transformers and decoded greedily on 500
problems that nobody saw, by code that shares nothing with the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.seeds import Figures, account, asked_for, compared, run_seeds
from tests.run.outside import fresh_problems, greedy_accuracy

PROBLEMS, PROBLEMS_SEED = 500, 20_261_124


def figures(summary: dict[str, Any], folder: Path) -> Figures:
    """One seed's row."""
    return {
        **account(summary),
        **compared(summary, "accuracy_greedy", "accuracy_sampled", "kl_teacher_student", "kl_student_teacher"),
        "fresh_accuracy_greedy": greedy_accuracy(folder / "final", fresh_problems(PROBLEMS, PROBLEMS_SEED)),
    }


if __name__ == "__main__":
    asked = asked_for(__doc__, range(5), "quickstart_seeds.json")
    run_seeds("quickstart", asked.seeds, asked.settings, asked.out, figures)
