"""A teacher outside is looked at before the first step, and what is wrong is said with both values."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import pytest

from streamopd.assets import resolve
from streamopd.config import Teacher
from streamopd.errors import ConfigError, TeacherAway, TeacherError
from streamopd.methods import load
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.score.http import HttpTeacher, open_http_teacher
from streamopd.score.probe import Student, probe, student_of
from streamopd.slots import Method
from tests.score import servers
from tests.score.servers import free_port, honest, made, perturbed, served

STOPS = (2,)
METHODS = ("forward_kl", "default")
TOKENIZER = Tokenizer.open(resolve("asset:quickstart-student"))


def student(method: Method, longest: int = 17) -> Student:
    contexts = [np.array([1, 4, 13, 5, 15], np.int32), np.array([1, *[4, 13] * (longest // 2), 15], np.int32)]
    return student_of(resolve("asset:quickstart-student"), STOPS, method.student_k, 33, contexts)


def found(urls: list[str], method: str, key: str = "", begun: bool = False) -> list[str]:
    """What the probe says of the servers at `urls`."""
    teacher, told = HttpTeacher("default", urls, STOPS, 512, key=key, timeout_s=5.0), []  # type: ignore[var-annotated]
    chosen = load(method)
    try:
        probe(teacher, student(chosen), chosen.evidence, told.append, wait_s=0.0, begun=begun)
    finally:
        teacher.close()
    return told


def sentence(app: object, method: str = "forward_kl") -> str:
    with served(app) as url, pytest.raises(TeacherError) as refused:
        found([url], method)
    return str(refused.value)


@pytest.mark.parametrize("method", METHODS)
def test_an_honest_teacher_passes_every_check(method: str) -> None:
    with served(honest().app) as one, served(honest().app) as two:
        told = found([one, two], method)
    text = "\n".join(told)
    assert "the student's 19 ids have the same tokens" in text
    assert "the first token is scored" in text
    assert "3 planted changes seen where they were planted" in text
    assert "replicas: 2, at most 0 nats apart" in text
    assert "tokens/s" in text


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "words"), [(servers.Shifted, "1 token too late"), (servers.ShiftedEarly, "1 token too early")])
def test_rows_that_are_one_token_off_are_refused(kind: type[servers.Shifted], words: str, method: str) -> None:
    told = sentence(made(kind).app, method)
    assert words in told
    assert "Row g speaks of predicting completion token g" in told


def test_another_tokenizer_is_refused_with_the_first_id_that_differs() -> None:
    server = honest()
    server.vocabulary.tokens[3], server.vocabulary.tokens[4] = server.vocabulary.tokens[4], server.vocabulary.tokens[3]
    told = sentence(server.app)
    assert "disagree on 2 of 19 ids, the first is 3: '1' against the student's '0'" in told


@pytest.mark.parametrize(
    ("method", "cap", "words"),
    [
        ("default", 8, "returns at most 8 log-probs a token; this method asks for 16"),
        ("forward_kl", 8, "asks for the whole vocabulary (19)"),
    ],
)
def test_a_cap_below_what_the_method_asks_is_refused_with_both_numbers(method: str, cap: int, words: str) -> None:
    assert words in sentence(honest(max_topk=cap).app, method)


def test_a_replica_with_other_weights_is_refused_by_what_it_scores(tmp_path: Path) -> None:
    other = honest(folder=perturbed(tmp_path / "other"))
    with served(honest().app) as one, served(other.app) as two, pytest.raises(TeacherError) as refused:
        found([one, two], "forward_kl")
    assert f"{one} and {two} disagree by up to" in str(refused.value)
    assert "They must serve the same weights" in str(refused.value)


def test_replicas_that_call_themselves_differently_are_refused() -> None:
    with served(honest().app) as one, served(honest(max_tokens=64).app) as two, pytest.raises(TeacherError, match="max_tokens=64"):
        found([one, two], "forward_kl")


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"max_tokens": 40}, "takes at most 40 tokens; the longest question with an answer"),
        ({"contract": 2}, "speaks contract 2, this streamopd 1"),
        ({"vocab_size": 18}, "scores 18 ids, the student's tokenizer has 19"),
    ],
)
def test_what_it_says_of_itself_is_held_to_the_run(info: dict[str, int], words: str) -> None:
    assert words in sentence(honest(**info).app, "default")


def test_what_it_cannot_score_is_left_out_and_said_aloud() -> None:
    with served(honest(scores_ids=False).app) as url:
        told = "\n".join(found([url], "default"))
    assert "it cannot score the student's top ids and stop ids: the support is its own top ids and the sampled token" in told


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (servers.NotANumber, "hold nan at token 0; a log-prob is finite and at most 0"),
        (servers.Short, "are [0], asked were [1]"),
        (servers.Deaf, "the same scores whatever the answer is"),
        (servers.Noisy, "gives other scores for the same call"),
        (servers.Contextless, "It does not read context_ids"),
        (servers.Unsorted, "nats away from the same item alone"),
        (servers.LeastLikely, "is not among topk_ids, whose lowest is"),
    ],
)
def test_what_it_does_is_held_to_the_contract(kind: type[servers.TeacherServer], words: str) -> None:
    assert words in sentence(made(kind).app, "default")


def test_distributions_that_never_move_are_refused() -> None:
    told = sentence(made(servers.Constant).app, "forward_kl")
    assert "the same distributions whatever was written before" in told or "has two log-probs" in told


def test_what_a_server_calls_itself_is_shown_on_one_line() -> None:
    with served(honest(model="a\x1b[2Jb\n" + "c" * 999).app) as url:
        (reached, *_) = found([url], "forward_kl")
    assert reached.isprintable()
    assert len(reached) < 400


def test_a_key_that_no_header_can_carry_is_refused_and_line_ends_are_not_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    named = Teacher(url="http://127.0.0.1:1", key_env="KEY")
    monkeypatch.setenv("KEY", "schlüssel")
    with pytest.raises(ConfigError, match=r"KEY holds a character that no HTTP header can carry"):
        open_http_teacher("default", named, TOKENIZER, 512)
    monkeypatch.setenv("KEY", "right\r\n")
    with served(honest(key="right").app) as url:
        teacher = open_http_teacher("default", msgspec.structs.replace(named, url=url), TOKENIZER, 512)
        assert teacher.meet().vocab_size == 19


def test_a_server_that_says_no_to_the_key_is_told_apart_from_one_that_is_away() -> None:
    no = r"with 401: the bearer token is missing or wrong\. Look at teachers\.default\.url and key_env"
    with served(honest(key="right").app) as url:
        assert found([url], "forward_kl", key="right")
        with pytest.raises(TeacherError, match=no):
            found([url], "forward_kl", key="another-key")


def test_the_key_is_in_no_sentence_even_when_the_server_repeats_it() -> None:
    app = servers.replying(info=servers.JSONResponse({"error": "secret-key-7 is unknown here"}, 403))
    with served(app) as url, pytest.raises(TeacherError) as refused:
        found([url], "forward_kl", key="secret-key-7")
    assert "secret-key-7" not in str(refused.value)
    assert "*** is unknown here" in str(refused.value)


def test_a_redirect_is_not_followed() -> None:
    with ExitStack() as stack:
        elsewhere = stack.enter_context(served(honest().app))
        url = stack.enter_context(served(servers.replying(info=servers.redirect(f"{elsewhere}/info"))))
        stack.enter_context(pytest.raises(TeacherError, match="307 to"))
        found([url], "forward_kl", key="k")


def test_a_server_that_is_not_there_is_named_before_the_run_and_waited_for_within_it() -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(TeacherError, match=rf"{nobody} does not answer GET /info.*Start it, or change teachers\.default\.url"):
        found([nobody], "forward_kl")
    with pytest.raises(TeacherAway, match=nobody):
        found([nobody], "forward_kl", begun=True)


def test_within_a_run_one_replica_that_answers_is_enough() -> None:
    with ExitStack() as stack:
        one = stack.enter_context(served(honest().app))
        told = found([f"http://127.0.0.1:{free_port()}", one], "forward_kl", begun=True)
    assert told[0].startswith(f"reached {one}")


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HTTP_PROXY", "http://127.0.0.1:9")
    with served(honest().app) as url:
        assert found([url], "forward_kl")
