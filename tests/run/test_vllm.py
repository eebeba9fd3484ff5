"""A whole run whose generator is vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamopd.watch.journal import read
from tests.run.runs import SMALL, accounts_are_exact, live_run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


@pytest.mark.parametrize("method", ["forward_kl", "default"])
def test_a_run_with_vllm_learns_with_swaps_in_flight(tmp_path: Path, method: str) -> None:
    settings = (*SMALL, "generator.engine=vllm", "learn.max_steps=80", f"method={method}")
    with live_run(tmp_path / "run", *settings) as run:
        found = run.end(300.0)
    assert (found["status"], found["steps"]) == ("completed", 80)
    accounts_are_exact(found)
    assert found["swaps"]["in_flight"] > 20
    losses = [line["metrics"]["loss"] for line in read(tmp_path / "run" / "metrics.jsonl")]
    if method == "forward_kl":  # so few steps show little of the other
        assert sum(losses[-10:]) < 0.7 * sum(losses[:10]), losses
    drill = [event["text"] for event in read(tmp_path / "run" / "events.jsonl") if event["kind"] == "drill"]
    assert len(drill) == 1
    samples = read(tmp_path / "run" / "samples.jsonl")
    assert any(len(rollout["weight_spans"]) > 1 for rollout in samples), "an answer of two versions"
