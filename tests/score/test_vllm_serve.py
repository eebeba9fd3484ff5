"""A real vLLM server as the teacher, started as the documentation says: what it scores, what the probe finds, a run that learns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streamopd.assets import resolve
from streamopd.errors import TeacherError
from streamopd.schemas import Group
from streamopd.slots import EvidenceRequest
from streamopd.watch.journal import read
from tests.run.runs import SMALL, accounts_are_exact, live_run
from tests.score.servers import MODEL, free_port
from tests.score.test_apis import OWN, found, local, met, same_view
from tests.score.test_http import groups, views_of  # noqa: F401  a fixture
from tests.score.test_local import FULL, SAMPLED, UNION

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

# docs/teachers.md; `vllm serve MODEL` is this module, and the CPU build lacks the command
SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve(MODEL)), "--dtype", "float32")


@contextmanager
def vllm_serve(*options: str) -> Iterator[str]:
    """The address of a server that answers."""
    port = free_port()
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [*SERVE, "--enforce-eager", "--host", "127.0.0.1", "--port", str(port), *options]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        while True:
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None


@pytest.fixture(scope="module")
def whole() -> Iterator[str]:
    with vllm_serve("--max-logprobs", "-1") as url:
        yield url


@pytest.mark.parametrize(
    ("api", "asked", "given"),
    [
        ("vllm", FULL, FULL), ("vllm", SAMPLED, SAMPLED), ("vllm", UNION, OWN),
        ("completions", SAMPLED, SAMPLED), ("completions", UNION, OWN),
    ],
)
def test_it_says_what_a_local_teacher_says(
    whole: str, groups: list[Group], api: str, asked: EvidenceRequest, given: EvidenceRequest  # noqa: F811
) -> None:
    theirs_all, ours_all = views_of(met(whole, api), groups, asked), views_of(local(), groups, given)
    for theirs, ours in zip(theirs_all, ours_all, strict=True):
        same_view(theirs, ours)


@pytest.mark.parametrize(("api", "method"), [("vllm", "forward_kl"), ("vllm", "default"), ("completions", "default")])
def test_it_passes_the_probe(whole: str, api: str, method: str) -> None:
    told = found(whole, api, method)
    assert "19 of the student's 19 ids decode to the same there" in told
    assert "3 planted changes seen where they were planted" in told
    assert "length: " in told
    assert ("it cannot score the student's top ids" in told) == (method == "default")


def test_a_run_learns_from_it(whole: str, tmp_path: Path) -> None:
    settings = (*SMALL, f"teachers.default.url={whole}", "teachers.default.api=vllm", "teachers.default.model=")
    with live_run(tmp_path / "run", *settings) as run:
        done = run.end()
    assert (done["status"], done["steps"]) == ("completed", 60)
    accounts_are_exact(done)
    losses = [line["metrics"]["loss"] for line in read(tmp_path / "run" / "metrics.jsonl")]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10]), losses


def test_its_ordinary_cap_is_found_out_and_named() -> None:
    with vllm_serve("--max-logprobs", "12") as url:
        info = met(url, "vllm").info
        assert info is not None
        assert (info.max_topk, info.vocab_size, info.max_tokens) == (12, 19, 127)
        with pytest.raises(TeacherError, match=r"at most 12 log-probs a token; this method asks for 16"):
            found(url, "vllm", "default")
