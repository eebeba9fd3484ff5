"""A teacher on the host of a composed run: used when it is right, refused before the first step when it is not."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamopd.watch.journal import read
from tests.run.runs import accounts_are_exact
from tests.run.test_outside_teacher import PYTHON
from tests.score import servers
from tests.score.servers import free_port, honest, made, perturbed, served

from .conftest import MakeProject
from .engine import Engine
from .project import Project

pytestmark = [pytest.mark.compose, pytest.mark.timeout(600)]

OVERLAY = "compose/external-teacher.yml"
SHORT = "-s evaluate.enabled=false -s learn.max_steps=30"


def bridge(engine: Engine) -> str:
    """The host's address that containers reach."""
    return engine.docker("network", "inspect", "bridge", "-f", "{{(index .IPAM.Config 0).Gateway}}").strip()


@contextmanager
def example(host: str) -> Iterator[int]:
    """The port of the plain-Python example."""
    port = free_port()
    process = subprocess.Popen([*PYTHON, str(port), host])
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://{host}:{port}/info", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


def in_containers(url: str) -> str:
    """A server's address on the host, as a container says it."""
    return f"http://host.docker.internal:{url.rpartition(':')[2]}"


def test_the_plain_example_on_the_host_teaches_a_composed_run(engine: Engine, make_project: MakeProject) -> None:
    with example(bridge(engine)) as port:
        url = f"http://host.docker.internal:{port}"
        project = make_project(OVERLAY, TEACHER_URL=url, STREAMOPD_ARGS=SHORT)
        project.up()
    assert project.exit_code("supervisor") == 0
    found = project.summary
    assert (found["status"], found["steps"]) == ("completed", 30)
    accounts_are_exact(found)
    (probed,) = [event["text"] for event in project.events if event["kind"] == "probe"]
    assert f"reached {url}" in probed
    assert "scores speak of their own token" in probed


def refusal(project: Project) -> str:
    """Why a run was refused, in the supervisor's words; nothing was trained."""
    project.up()
    assert project.exit_code("supervisor") != 0
    assert not read(project.run / "metrics.jsonl")
    return (project.run / "state" / "over").read_text()


def another_tokenizer() -> servers.TeacherServer:
    server = honest()
    server.vocabulary.tokens[3], server.vocabulary.tokens[4] = server.vocabulary.tokens[4], server.vocabulary.tokens[3]
    return server


@pytest.mark.parametrize(
    ("make", "method", "words"),
    [
        (lambda: made(servers.Shifted), "forward_kl", ["1 token too late", "row g holds what belongs to token g - 1"]),
        (another_tokenizer, "forward_kl", ["the first is 3: '1' against the student's '0'"]),
        (lambda: honest(max_topk=8), "default", ["at most 8 log-probs a token; this method asks for 16"]),
    ],
    ids=["shifted", "tokenizer", "cap"],
)
def test_a_wrong_teacher_is_refused_before_the_first_step(
    engine: Engine, make_project: MakeProject, make: Any, method: str, words: list[str]
) -> None:
    with served(make().app, host=bridge(engine)) as url:
        project = make_project(OVERLAY, TEACHER_URL=in_containers(url), STREAMOPD_ARGS=f"{SHORT} -s method={method}")
        told = refusal(project)
    for word in words:
        assert word in told


def test_a_replica_that_disagrees_is_refused_before_the_first_step(engine: Engine, make_project: MakeProject, tmp_path: Path) -> None:
    host, other = bridge(engine), honest(folder=perturbed(tmp_path / "other"))
    with served(honest().app, host=host) as one, served(other.app, host=host) as two:
        urls = [in_containers(url) for url in (one, two)]
        project = make_project(OVERLAY, TEACHER_URL=f"""'["{urls[0]}","{urls[1]}"]'""", STREAMOPD_ARGS=SHORT)
        told = refusal(project)
    assert f"{urls[0]} and {urls[1]} disagree by up to" in told
    assert "allowed are 0.25" in told
