"""Real runs with a teacher outside: the examples of the docs, several replicas, and servers that will not do."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamopd.assets import resolve
from streamopd.watch.journal import read
from tests.run.runs import COMMAND, SMALL, accounts_are_exact, live_run, no_process_is_left, overrides, streamopd, summary
from tests.run.test_refusals import it_is_one_paragraph
from tests.score import servers, strangers
from tests.score.servers import free_port, honest, made, served

pytestmark = pytest.mark.timeout(300)

EXAMPLES = Path(__file__).parent.parent.parent / "docs" / "examples"
MODEL = str(resolve("asset:quickstart-teacher"))
PYTHON = (sys.executable, "-I", str(EXAMPLES / "teacher.py"), MODEL)
NODE = ("node", str(EXAMPLES / "teacher.mjs"), f"{MODEL}/tokenizer.json")
OURS = (*COMMAND, "serve-teacher", "asset:quickstart-teacher", "--port")


@contextmanager
def teacher(*command: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(address, process) of a server that answers."""
    port = free_port()
    process, url = subprocess.Popen([*command, str(port)]), f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            try:
                urllib.request.urlopen(f"{url}/info", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()


def test_the_python_example_knows_nothing_of_streamopd() -> None:
    text = (EXAMPLES / "teacher.py").read_text()
    assert not [line for line in text.splitlines() if "import" in line and "streamopd" in line]


@pytest.mark.parametrize(
    ("method", "command"), [("forward_kl", PYTHON), ("forward_kl", OURS), ("default", PYTHON), ("default", NODE)],
    ids=["whole-python", "whole-serve-teacher", "support-python", "support-node"],
)
def test_a_run_learns_from_a_teacher_outside(tmp_path: Path, method: str, command: tuple[str, ...]) -> None:
    settings = (*SMALL, f"method={method}", "learn.max_steps=12", "teachers.default.model=")
    with teacher(*command) as (url, _), live_run(tmp_path / "run", *settings, f"teachers.default.url={url}") as run:
        found = run.end()
    accounts_are_exact(found)
    assert found["steps"] == 12
    events = [event["text"] for event in read(tmp_path / "run" / "events.jsonl") if event["kind"] == "probe"]
    assert len(events) == 1
    assert f"reached {url}" in events[0]


@pytest.mark.kill
def test_one_of_two_replicas_is_killed_and_the_run_goes_on(tmp_path: Path) -> None:
    with ExitStack() as stack:
        one, first = stack.enter_context(teacher(*PYTHON))
        two, _ = stack.enter_context(teacher(*PYTHON))
        run = stack.enter_context(live_run(tmp_path / "run", *SMALL, f'teachers.default.url=["{one}", "{two}"]'))
        run.wait(lambda: run.steps > 10)
        first.kill()
        found = run.end()
    accounts_are_exact(found)
    assert found["steps"] == 60
    assert not found["groups_dropped"].keys() - {"unused"}, found


@pytest.mark.kill
def test_a_teacher_that_is_away_for_a_while_is_waited_for_by_name(tmp_path: Path) -> None:
    port = free_port()
    command = [*PYTHON, str(port)]
    first = subprocess.Popen(command)
    try:
        with live_run(tmp_path / "run", *SMALL, f"teachers.default.url=http://127.0.0.1:{port}") as run:
            run.wait(lambda: run.steps > 5)
            first.kill()
            first.wait()
            run.wait(lambda: "waits for its teacher" in (tmp_path / "run" / "events.jsonl").read_text())
            run.wait(lambda: f"127.0.0.1:{port}" in run.status())
            again = subprocess.Popen(command)
            try:
                found = run.end()
            finally:
                again.kill()
    finally:
        first.kill()
    accounts_are_exact(found)
    assert not found["groups_dropped"].keys() - {"unused"}, found


@pytest.mark.parametrize(
    ("api", "make", "method"), [("vllm", strangers.vllm, "default"), ("sglang", strangers.sglang, "forward_kl")], ids=["vllm", "sglang"]
)
def test_a_run_learns_from_somebody_elses_server(tmp_path: Path, api: str, make: Callable[..., Any], method: str) -> None:
    with served(make(strangers.Stranger())) as url:
        settings = (f"method={method}", "learn.max_steps=12", f"teachers.default.url={url}", f"teachers.default.api={api}")
        with live_run(tmp_path / "run", *SMALL, *settings) as run:
            found = run.end()
    accounts_are_exact(found)
    assert found["steps"] == 12
    (told,) = [event["text"] for event in read(tmp_path / "run" / "events.jsonl") if event["kind"] == "probe"]
    assert ("it cannot score the student's top ids and stop ids" in told) == (method == "default")


def test_a_budget_that_is_spent_ends_the_run_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    """Nothing was asked beyond it, and nothing that waits is lost."""
    stranger, folder = strangers.Stranger(), tmp_path / "run"
    with served(strangers.vllm(stranger)) as url:
        settings = (*SMALL, "learn.max_steps=40", f"teachers.default.url={url}", "teachers.default.api=vllm")
        spent = streamopd("run", "quickstart", "--out", str(folder), *overrides(*settings, "teachers.default.token_limit=9000"))
        it_is_one_paragraph(spent, "The budget of teacher 'default' is spent", "teachers.default.token_limit = 9,000")
        assert spent.returncode == 1
        assert 3000 < stranger.asked <= 9000 + 400, "beyond it there is what caps are measured with"
        done = summary(folder)
        assert done["status"] == "failed"
        no_process_is_left(folder)
        again = streamopd("run", "quickstart", "--out", str(folder), *overrides(*settings, "teachers.default.token_limit=900000"))
    assert again.returncode == 0, again.stderr
    found = summary(folder)
    assert found["steps"] == 40 > done["steps"] > 0
    accounts_are_exact(found)


@pytest.mark.parametrize(
    ("kind", "words"),
    [(servers.Shifted, "1 token too late"), (servers.NotANumber, "nan"), (servers.Deaf, "the same scores whatever the answer is")],
)
def test_a_teacher_that_will_not_do_ends_the_run_before_its_first_step(
    tmp_path: Path, kind: type[servers.TeacherServer], words: str
) -> None:
    with served(made(kind).app) as url:
        answer = streamopd("run", "quickstart", "--out", str(tmp_path / "run"), *overrides(*SMALL, f"teachers.default.url={url}"))
    it_is_one_paragraph(answer, words, "Teacher 'default'")
    assert not read(tmp_path / "run" / "metrics.jsonl")
    no_process_is_left(tmp_path)


def test_the_probe_by_hand_says_the_same(tmp_path: Path) -> None:
    with served(honest().app) as good, served(made(servers.Shifted).app) as bad:
        passed = streamopd("probe", "teacher", "quickstart", "-s", f"teachers.default.url={good}")
        refused = streamopd("probe", "teacher", "quickstart", "-s", f"teachers.default.url={bad}")
    assert passed.returncode == 0, passed.stderr
    assert "scores speak of their own token" in passed.stdout
    assert refused.returncode == 2
    it_is_one_paragraph(refused, "1 token too late")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["teachers.default.url=ftp://x"], "it is http://HOST[:PORT]"),
        (["teachers.default.url=http://[::1"], "it is http://HOST[:PORT]"),
        (["teachers.default.url=http://a:b@x"], "holds a password"),
        (["teachers.default.key_env=KEY"], "there is no url to send the key to"),
        (["teachers.default.api=vllm"], "there is no url of such a server"),
        (["teachers.default.model="], "needs a model (a folder), or a url"),
        (['teachers.default.url=["http://x", "http://x"]'], "names one server twice"),
    ],
)
def test_a_wrong_address_is_refused_before_anything_starts(tmp_path: Path, settings: list[str], sentence: str) -> None:
    answer = streamopd("run", "quickstart", "--out", str(tmp_path / "run"), *overrides(*settings))
    assert answer.returncode == 2, answer
    it_is_one_paragraph(answer, sentence)


def test_serving_beyond_loopback_needs_a_key() -> None:
    answer = streamopd("serve-teacher", "asset:quickstart-teacher", "--host", "0.0.0.0")
    assert answer.returncode == 2
    it_is_one_paragraph(answer, "Listening on 0.0.0.0", "--key-env")
