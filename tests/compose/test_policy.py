"""What every container may and may not, in the file and from inside a running one."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest

from .conftest import MakeProject
from .project import ROOT, Project

pytestmark = [pytest.mark.compose, pytest.mark.timeout(600)]

OVERLAYS = sorted(file.name for file in (ROOT / "compose").glob("*.yml"))
SETTINGS = {"TEACHER_URL": "http://host.docker.internal:8001"}
ROOT_ONLY = ("prepare",)     # gives folders and credentials away, has no network, and is gone before anything begins


def every_combination() -> list[tuple[str, ...]]:
    return [chosen for count in range(len(OVERLAYS) + 1) for chosen in combinations(OVERLAYS, count)]


@pytest.mark.parametrize("overlays", every_combination(), ids="+".join)
def test_every_combination_of_overlays_is_a_compose_file_that_keeps_the_policy(
    make_project: MakeProject, overlays: tuple[str, ...]
) -> None:
    project = make_project(*(f"compose/{name}" for name in overlays), **SETTINGS)
    config = json.loads(project.compose("config", "--format", "json"))
    for name, service in config["services"].items():
        holds_policy(name, service)
    assert config["networks"]["bus"]["internal"] is True
    text = json.dumps(config)
    assert not re.search(r'"[A-Z_]*(PASSWORD|SECRET|TOKEN)[A-Z_]*": "[^"]+"', text), "a secret is in no file"


def holds_policy(name: str, service: dict[str, Any]) -> None:
    assert service.get("read_only") is True, name
    assert service["cap_drop"] == ["ALL"], name
    assert "no-new-privileges:true" in service["security_opt"], name
    assert service["init"] is True, name
    assert not service.get("privileged"), name
    assert "container_name" not in service, f"{name} could not be scaled"
    assert service["logging"]["options"]["max-size"], name
    assert int(service["mem_limit"]) > 0, name
    assert service.get("pids_limit", 0) > 0, name
    if name in ROOT_ONLY:
        assert service["network_mode"] == "none", name
        assert service["restart"] == "no" if "restart" in service else True, name
    else:
        assert service["user"].partition(":")[0] not in ("", "0", "root"), name
        assert not service.get("cap_add"), name
    for port in service.get("ports", []):
        assert port.get("host_ip") == "127.0.0.1", f"{name} publishes {port}"
    for volume in service.get("volumes", []):
        assert volume["source"] != "/var/run/docker.sock", name


def test_without_credentials_the_broker_does_not_start(make_project: MakeProject) -> None:
    project = make_project()
    project.compose("build", "prepare")
    said = project.compose("run", "--rm", "--no-deps", "redis", check=False, timeout_s=60)
    assert "redis.acl" in said, said


def test_inside_the_network_each_may_what_it_needs_and_no_more(make_project: MakeProject) -> None:
    project = make_project(STREAMOPD_ARGS="-s evaluate.enabled=false -s learn.max_steps=400")
    project.up("-d")
    project.wait_steps(5)
    for service in ("supervisor", "feeder", "generator", "teacher", "packer", "learner", "redis"):
        facts = project.execute(service, "sh", "-c", "id -u; grep CapEff /proc/self/status; touch /app/x /x 2>&1 | sort -u")
        assert facts.stdout.splitlines()[0] != "0", service
        assert "CapEff:\t0000000000000000" in facts.stdout, service
        assert facts.stdout.count("Read-only file system") == 2, facts.stdout
    assert "NOAUTH" in talk(project, "generator", "KEYS *")
    assert "WRONGPASS" in talk(project, "generator", "AUTH generator guess", "KEYS *")
    assert "Read-only file system" in project.execute("generator", "touch", "/runs/quickstart/weights/x").stderr
    assert "Permission denied" in project.execute("generator", "cat", "/secrets/learner").stderr
    refused = project.execute("generator", "python", "-c", WRITE_WEIGHTS)
    assert refused.stdout.startswith("refused"), refused
    assert project.execute("learner", "python", "-c", WRITE_WEIGHTS.replace("generator", "learner")).stdout.strip() == "1"
    assert "unreachable" in project.execute("generator", "python", "-c", OUT).stdout, "no way out of the network"
    logs = project.compose("logs", "--no-color")
    for service in ("supervisor", "feeder", "generator", "teacher", "packer", "learner"):
        user, _, password = project.execute(service, "cat", f"/secrets/{service}").stdout.partition(":")
        assert (user, len(password)) == (service, 43)
        assert password not in logs, service


def talk(project: Project, service: str, *commands: str) -> str:
    """What Redis answers to plain words."""
    words = "".join(f"{command}\\r\\n" for command in commands)
    script = f"exec 3<>/dev/tcp/redis/6379; printf '{words}' >&3; timeout 2 cat <&3; true"
    return project.execute(service, "bash", "-c", script).stdout


WRITE_WEIGHTS = """
import redis
user, password = open("/secrets/generator").read().split(":")
client = redis.Redis("redis", username=user, password=password)
(key,) = [key for key in client.scan_iter() if key.endswith(b":weights")]
try:
    print(client.hset(key, "x", "y"))
except redis.exceptions.NoPermissionError as error:
    print("refused", error)
"""

OUT = """
import socket
try:
    socket.create_connection(("1.1.1.1", 80), 3)
    print("reached")
except OSError as error:
    print(error)
"""
