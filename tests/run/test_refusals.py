"""What is wrong is said in one paragraph, before anything starts, with an exit code that tells the truth."""

from __future__ import annotations

import re
import shutil
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamopd.assets import resolve
from tests.run.runs import SMALL, no_process_is_left, overrides, streamopd


def it_is_one_paragraph(answer: subprocess.CompletedProcess[str], *named: str) -> None:
    """stderr says what is wrong, in a few sentences, and shows no trace."""
    assert answer.returncode not in (0, 130), answer
    assert "Traceback" not in answer.stdout + answer.stderr, answer.stderr
    said = answer.stderr.strip()
    assert said.startswith("streamopd: "), answer
    assert "\n\n" not in said, said
    assert len(said) < 1500, said
    for word in named:
        assert word in said, f"{word!r} is not in: {said}"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["learn.max_step=1"], "Unknown key learn.max_step. Did you mean learn.max_steps?"),
        (["student.model=nowhere"], "nowhere"),
        (["teachers.default.model=asset:quickstart-techer"], "asset:quickstart-teacher"),
        (["data.train=chain-summ"], "chain-sum"),
        (["data.train=missing.jsonl", "data.options={}"], "missing.jsonl"),
        (["method=defualt"], "Did you mean 'default'?"),
        (["data.grader=wrong"], "wrong"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(tmp_path: Path, settings: list[str], sentence: str) -> None:
    answer = streamopd("run", "quickstart", "--out", str(tmp_path / "run"), *overrides(*settings))
    assert answer.returncode == 2, answer
    it_is_one_paragraph(answer, sentence)
    no_process_is_left(tmp_path)


@pytest.mark.parametrize("holds", ["nothing", "something else", "all but the weights"])
def test_a_teacher_path_without_a_model_is_refused_before_anything_starts(tmp_path: Path, holds: str) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    if holds == "something else":
        (folder / "notes.txt").write_text("the weights are on the other disk")
    if holds == "all but the weights":
        whole, weights = resolve("asset:quickstart-teacher"), shutil.ignore_patterns("*.safetensors")
        shutil.copytree(whole, folder, ignore=weights, dirs_exist_ok=True)
    answer = streamopd("run", "quickstart", "--out", str(tmp_path / "run"), *overrides(f"teachers.default.model={folder}"))
    assert answer.returncode == 2, answer
    it_is_one_paragraph(answer, str(folder))
    no_process_is_left(tmp_path)


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    settings = overrides(f"data.train={tmp_path / 'empty.jsonl'}", "data.options={}")
    answer = streamopd("run", "quickstart", "--out", str(tmp_path / "run"), *settings)
    assert answer.returncode == 2
    assert "empty.jsonl" in answer.stderr


def test_an_unreachable_broker_is_named_with_its_address(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        answer = streamopd("run", "quickstart", "--out", str(tmp_path / "run"), *overrides(f"redis.url=redis://127.0.0.1:{port}"))
    assert answer.returncode == 2
    it_is_one_paragraph(answer, str(port))
    no_process_is_left(tmp_path)


class Babbler(socketserver.BaseRequestHandler):
    """Whatever it is asked, it answers as a web server would."""

    def handle(self) -> None:
        while self.request.recv(4096):
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture
def babbling_port() -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Babbler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_port_in_use_by_something_else_is_named(tmp_path: Path, babbling_port: int) -> None:
    settings = overrides(f"redis.url=redis://127.0.0.1:{babbling_port}")
    answer = streamopd("run", "quickstart", "--out", str(tmp_path / "run"), *settings)
    assert answer.returncode == 2, answer
    it_is_one_paragraph(answer, str(babbling_port))
    no_process_is_left(tmp_path)


@pytest.mark.kill
@pytest.mark.timeout(300)
def test_a_refusal_by_the_learner_ends_the_run_and_leaves_no_orphan(tmp_path: Path) -> None:
    """Only the learner can know that there is no such module to adapt: everybody else is up by then."""
    settings = overrides(*SMALL, "learn.lora.rank=4", 'learn.lora.target_modules=["no_such_proj"]')
    answer = streamopd("run", "quickstart", "--out", str(tmp_path / "run"), *settings)
    it_is_one_paragraph(answer, "learn.lora.target_modules", "no_such_proj")
    no_process_is_left(tmp_path)


@pytest.mark.kill
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", ["64k", "12m"], ids=["no room for anything", "no room after a few versions"])
def test_a_full_disk_is_told_with_what_is_needed_and_what_is_free(tmp_path: Path, size: str) -> None:
    """The run folder lies on a small disk of its own, in a mount namespace that ends with the command."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = f'mount -t tmpfs -o size={size} none "{disk}" && exec "$@"'
    settings = overrides(*SMALL, "sync.keep_versions=1000", "learn.max_steps=1000")
    answer = streamopd(
        "run", "quickstart", "--out", str(disk / "run"), *settings, before=("unshare", "-Urm", "sh", "-c", mounting, "sh")
    )
    it_is_one_paragraph(answer, "full", str(disk))
    assert len(re.findall(r"\b[\d,]+ (?:bytes|are free)", answer.stderr)) >= 2, answer.stderr
    no_process_is_left(tmp_path)


def test_debug_shows_the_trace(tmp_path: Path) -> None:
    answer = streamopd("--debug", "run", str(tmp_path / "nowhere.toml"))
    assert answer.returncode == 2
    assert "Traceback" in answer.stderr


def test_a_status_of_no_run_says_what_to_do(tmp_path: Path) -> None:
    answer = streamopd("status", str(tmp_path))
    assert answer.returncode == 2
    assert "holds no run" in answer.stderr
