"""SmolLM2 once a session: the one that was fetched before, or fetched now; and room that is given back."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FETCH_SCRIPT = ROOT / "recipes" / "fetch_smollm2.py"


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes: emptied when the test is over."""
    folder = tmp_path / "roomy"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def smollm2(roomy: Path) -> Path:
    """The model's folder with its data."""
    here = ROOT / "models" / "smollm2"
    if all((here / name).is_file() for name in ("model.safetensors", "train.jsonl", "heldout.jsonl")):
        return here
    runpy.run_path(str(FETCH_SCRIPT))["fetch"](roomy / "smollm2")
    return roomy / "smollm2"
