"""The SmolLM2 recipe for three seeds: what it learns, what that does to the model otherwise, and what it takes.

    python recipes/fetch_smollm2.py
    python -m benchmarks.smollm2_seeds [--seeds 0 1 2] [--out benchmarks/results/smollm2_seeds.json]

`accuracy_*/json` is the rate of the style on questions, `accuracy_*/prose` the share of other requests that stay prose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.seeds import Figures, account, asked_for, compared, run_seeds

STYLE = ("accuracy_greedy/json", "accuracy_sampled/json")
DISTANCE = ("kl_teacher_student/json", "kl_student_teacher/json", "kl_teacher_student", "kl_student_teacher")
OTHERWISE = ("accuracy_greedy/prose", "accuracy_sampled/prose", "kl_teacher_student/prose", "text_perplexity")


def figures(summary: dict[str, Any], folder: Path) -> Figures:
    """One seed's row."""
    return {
        **account(summary),
        "minutes": round(summary["wall_s"] / 60, 1),
        "peak_rss_mb": {service: round(mb) for service, mb in summary["peak_rss_mb"].items()},
        **compared(summary, *STYLE, *DISTANCE, *OTHERWISE),
    }


if __name__ == "__main__":
    asked = asked_for(__doc__, range(3), "smollm2_seeds.json")
    run_seeds("smollm2-json", asked.seeds, asked.settings, asked.out, figures)
