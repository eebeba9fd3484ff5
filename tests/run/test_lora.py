"""A run that trains adapters: they alone are published, and what is written is of the weights they make."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamopd.assets import resolve
from streamopd.watch.journal import read
from tests.run.outside import replayed_logprobs
from tests.run.runs import SMALL, accounts_are_exact, live_run

pytestmark = pytest.mark.timeout(300)

LORA = (*SMALL, "learn.lora.rank=4", "learn.lr=0.01", "learn.max_steps=30", "sync.keep_versions=40")


def check(folder: Path, settings: tuple[str, ...]) -> None:
    with live_run(folder, *settings) as run:
        found = run.end()
    assert (found["status"], found["steps"]) == ("completed", 30)
    accounts_are_exact(found)
    assert found["swaps"]["in_flight"] > 5
    size = (resolve("asset:quickstart-student") / "model.safetensors").stat().st_size
    published = sorted((folder / "weights").glob("weight_v*"))
    assert len(published) == 31
    assert all(not (one / "model.safetensors").exists() for one in published)
    assert all((one / "adapter_model.safetensors").stat().st_size < size / 5 for one in published)
    samples = [sample for sample in read(folder / "samples.jsonl") if len(sample["completion_ids"]) > 3]
    late = [sample for sample in samples if sample["weight_spans"][-1][1] >= 10]
    assert any(len(sample["weight_spans"]) > 1 for sample in late), "an answer of two versions"
    for sample in late[:12]:
        replayed = replayed_logprobs(sample, folder / "weights").tolist()
        assert sample["logprobs"] == pytest.approx(replayed, abs=1e-3)
        first = replayed_logprobs(sample | {"weight_spans": [[0, 0, "keep"]]}, folder / "weights").tolist()
        assert max(abs(a - b) for a, b in zip(first, replayed, strict=True)) > 1e-2, "the adapters change nothing"


def test_adapters_are_published_alone_and_hot_loaded(tmp_path: Path) -> None:
    check(tmp_path / "run", LORA)


@pytest.mark.vllm
def test_adapters_are_hot_loaded_into_vllm(tmp_path: Path) -> None:
    check(tmp_path / "run", (*LORA, "generator.engine=vllm"))
