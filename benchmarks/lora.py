"""The quickstart with adapters beside the quickstart with full weights: bytes published, swaps, accuracy.

    python -m benchmarks.lora [--seeds 0] [-s learn.lora.rank=16] [--out benchmarks/results/lora.json]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.seeds import Figures, account, asked_for, compared, run_seeds

ADAPTERS = ("learn.lora.rank=16", "learn.lora.alpha=32", "learn.lr=0.01")


def figures(summary: dict[str, Any], folder: Path) -> Figures:
    """One run's row; the versions that are kept tell the size of each."""
    sizes = [json.loads(file.read_text())["nbytes"] for file in sorted((folder / "weights").glob("weight_v*/manifest.json"))]
    assert len(set(sizes)) == 1, sizes
    published = summary["steps"] + 1
    return {
        **account(summary), **compared(summary, "accuracy_greedy", "accuracy_sampled"),
        "published": {"versions": published, "bytes_each": sizes[0], "mb_in_all": round(published * sizes[0] / 1e6, 1)},
    }


if __name__ == "__main__":
    asked = asked_for(__doc__, [0], "lora.json")
    adapters = tuple(asked.settings) or ADAPTERS
    run_seeds("quickstart", asked.seeds, adapters, asked.out, figures)
    run_seeds("quickstart", asked.seeds, (), asked.out.with_name(f"{asked.out.stem}_full.json"), figures)
