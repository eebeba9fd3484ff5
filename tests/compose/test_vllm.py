"""vLLM in a container of its own: its image is built, and its generator writes for a composed run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.run.runs import accounts_are_exact

from .conftest import MakeProject
from .engine import images

pytestmark = [pytest.mark.compose_vllm, pytest.mark.timeout(2400)]


def test_a_generator_with_vllm_is_built_and_writes(make_project: MakeProject, vllm_wheels: Path) -> None:
    settings = "-s generator.engine=vllm -s evaluate.enabled=false -s learn.max_steps=60"
    project = make_project("compose/vllm.yml", "tests/compose/closed-net-vllm.yml", STREAMOPD_ARGS=settings, WHEELHOUSE=str(vllm_wheels))
    began_s = time.monotonic()
    project.compose("build", timeout_s=1800)
    print(f"\nbuild: {time.monotonic() - began_s:.0f} s, images {images(project.engine, ['streamopd:vllm'])}")
    told = project.up()
    assert project.exit_code("supervisor") == 0, told[-3000:]
    (generator,) = project.compose("ps", "-aq", "generator").split()
    assert project.inspect(generator, "{{.Config.Image}}") == "streamopd:vllm"
    found = project.summary
    assert (found["status"], found["steps"]) == ("completed", 60)
    assert found["swaps"]["in_flight"] >= 3
    accounts_are_exact(found)
    assert not any(project.restarts().values()), project.restarts()
