"""`docker compose up`, for real: to the end, scaled and killed and taken up again while it runs."""

from __future__ import annotations

import time

import pytest

from streamopd.watch.journal import read
from tests.run.outside import fresh_problems, greedy_accuracy
from tests.run.runs import accounts_are_exact

from .conftest import MakeProject
from .engine import images
from .project import Project

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

FATES = {"unused", "expired"}  # what a killed process held is written or scored by another one, and may be too old to train by then
SHORT = "-s evaluate.enabled=false -s learn.save_steps=10 -s learn.max_steps={}"


def test_up_on_a_plain_clone_learns_tells_the_result_and_ends(make_project: MakeProject) -> None:
    project, began_s = make_project(), time.monotonic()
    told = project.up()
    print(f"\nup: {time.monotonic() - began_s:.0f} s, images {images(project.engine, ['streamopd:base', 'streamopd:torch'])}")
    assert project.exit_code("supervisor") == 0, told[-3000:]
    found = project.summary
    print({key: found[key] for key in ("wall_s", "startup_s", "eval", "swaps", "peak_rss_mb")})
    assert found["status"] == "completed"
    accuracy = found["eval"]["accuracy_greedy"]
    assert accuracy["before"] <= 0.30
    assert accuracy["teacher"] >= 0.97
    assert accuracy["after"] >= 0.95 * accuracy["teacher"]
    assert found["swaps"]["count"] >= 100
    assert found["swaps"]["in_flight"] >= 1
    accounts_are_exact(found)
    assert "accuracy_greedy" in told, "people see the result"
    assert not any(project.restarts().values()), project.restarts()
    fresh = greedy_accuracy(project.run / "final", fresh_problems(200, 7))
    assert abs(fresh - accuracy["after"]) < 0.06, (fresh, accuracy)

    again = project.up()
    assert project.exit_code("supervisor") == 0
    assert "completed" in again
    assert project.summary == found, "a completed run is told again, not begun again"


def test_generators_and_teachers_join_die_and_leave_while_it_runs(make_project: MakeProject) -> None:
    project = make_project(STREAMOPD_ARGS=SHORT.format(400))
    project.up("-d")
    project.wait_steps(20)
    first = {service: project.containers(service)[0] for service in ("generator", "teacher")}
    others = {service: project.containers(service)[0] for service in ("redis", "supervisor", "feeder", "packer", "learner")}
    since_s = time.time()
    project.up("-d", "--no-recreate", "--scale", "generator=3", "--scale", "teacher=2")
    project.wait(lambda: len(served(project, since_s)) == 2, "two more generators that serve")
    started_s = {name(project, id_): started(project, id_) for id_ in project.containers("generator")}
    joined = served(project, since_s)
    print("\nseconds to the first weights:", [round(event["born_s"] - started_s[host_of(s)], 1) for s, event in joined.items()])
    for event in joined.values():
        newest = max((line["n"] for line in read(project.run / "metrics.jsonl") if line["born_s"] < event["born_s"]), default=0)
        assert event["data"]["n"] >= newest - 2, "a joiner began with old weights"
    step = project.steps
    for container in first.values():
        project.engine.docker("kill", container)
    project.wait_steps(step + 30)
    project.up("-d", "--no-recreate", "--scale", "generator=1", "--scale", "teacher=1")
    assert {service: project.containers(service)[0] for service in others} == others
    assert {project.inspect(id_, "{{.RestartCount}}") for id_ in others.values()} == {"0"}
    found = project.end()
    assert (found["status"], found["steps"]) == ("completed", 400)
    accounts_are_exact(found)
    assert not set(found["groups_dropped"]) - FATES, found["groups_dropped"]
    assert {project.restarts()[key] for key in project.restarts()} == {0}


def test_down_and_up_again_resumes_from_the_volumes(make_project: MakeProject) -> None:
    project = make_project(STREAMOPD_ARGS=SHORT.format(120))
    project.up("-d")
    project.wait_steps(40)
    project.compose("down")
    kept = project.steps
    assert 40 <= kept < 120
    project.up("-d")
    found = project.end()
    assert (found["status"], found["steps"]) == ("completed", 120)
    accounts_are_exact(found)
    project.environment["STREAMOPD_ARGS"] = SHORT.format(150)  # what has ended goes on when more is asked for
    project.up("-d")
    found = project.end()
    assert (found["status"], found["steps"]) == ("completed", 150)
    accounts_are_exact(found)
    begins = [event["text"] for event in project.events if "lineage" in event["text"]]
    assert any("begins at step" in text and not text.endswith("step 0") for text in begins), begins


def test_each_service_crashes_in_turn_and_redis_loses_its_volume(make_project: MakeProject) -> None:
    settings = "-s learn.save_steps=10 -s data.heldout_size=16 -s learn.max_steps=500"
    project = make_project(STREAMOPD_ARGS=settings)
    project.up("-d")
    project.wait_steps(10)
    for service in ("feeder", "generator", "teacher", "packer", "learner", "evaluator", "supervisor", "redis"):
        step = project.steps
        project.crash(service)
        project.wait_steps(step + 15)
    step = project.steps
    project.compose("rm", "-sf", "redis", "prepare")
    project.engine.docker("volume", "rm", f"{project.name}_redis")
    project.up("-d", "--no-recreate")
    project.wait_steps(step + 15)
    assert project.steps < 500, "the last crash was to come in mid-training"
    found = project.end()
    assert (found["status"], found["steps"]) == ("completed", 500)
    accounts_are_exact(found)
    assert not set(found["groups_dropped"]) - FATES, found["groups_dropped"]
    steps = [line["n"] for line in read(project.run / "metrics.jsonl")]
    assert steps == list(range(1, 501)), "each step is written down once"
    assert found["eval"]["accuracy_greedy"]["after"] is not None


def served(project: Project, since_s: float) -> dict[str, dict[str, object]]:
    """First weights of each generator that began to serve since then."""
    return {event["source"]: event for event in project.events if event["kind"] == "serve" and event["born_s"] > since_s}


def host_of(source: str) -> str:
    """generator-<host name>-<pid>-<pid>: the host name is the beginning of the container's id."""
    return source.split("-")[1]


def name(project: Project, container: str) -> str:
    return project.inspect(container, "{{.Config.Hostname}}")


def started(project: Project, container: str) -> float:
    """Seconds since the epoch."""
    from datetime import datetime

    at = project.inspect(container, "{{.State.StartedAt}}")
    return datetime.fromisoformat(at[:26].rstrip("Z") + "+00:00").timestamp()
