"""A teacher outside says what a local one says; whatever its server does, nothing is lost and nothing wrong gets through."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from streamopd.assets import resolve
from streamopd.errors import GarbageRecord, TeacherAway, TeacherRefuses
from streamopd.schemas import Evidence, Group
from streamopd.schemas.teaching import JSON
from streamopd.score import replica as replicas
from streamopd.score.api.contract import Contract
from streamopd.score.check import check_evidence
from streamopd.score.http import HttpTeacher
from streamopd.score.local import LocalTeacher
from streamopd.score.probe import probe
from streamopd.slots import EvidenceRequest
from tests.score import servers
from tests.score.servers import MODEL, free_port, honest, made, perturbed, served
from tests.score.test_local import FULL, SAMPLED, UNION
from tests.score.test_probe import STOPS, student

GroupMaker = Callable[..., Group]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(honest().app) as address:
        yield address


@pytest.fixture
def groups(make_group: GroupMaker) -> list[Group]:
    return [make_group(seq, (7, 3), vocab=19) for seq in range(5)]


def open_teacher(*urls: str, timeout_s: float = 5.0, limit_s: float = 20.0, key: str = "") -> HttpTeacher:
    return HttpTeacher("default", list(urls), STOPS, 64, key=key, timeout_s=timeout_s, limit_s=limit_s)


def met(*urls: str, **settings: float) -> HttpTeacher:
    teacher = open_teacher(*urls, **settings)  # type: ignore[arg-type]
    teacher.meet()
    return teacher


def views_of(teacher: HttpTeacher | LocalTeacher, groups: list[Group], request: EvidenceRequest) -> list[Evidence]:
    views = teacher.score(groups, request)
    for group, of_group in zip(groups, views, strict=True):
        check_evidence(group, of_group, 19)
    return [view for of_group in views for of_rollout in of_group for view in of_rollout]


@pytest.mark.parametrize("request_", [FULL, UNION, SAMPLED], ids=["full", "union", "sampled"])
@pytest.mark.parametrize("form", ["msgpack", "json"])
def test_it_says_what_a_local_teacher_says(url: str, groups: list[Group], request_: EvidenceRequest, form: str) -> None:
    teacher, local = met(url), LocalTeacher(resolve(MODEL), "default", "float32", STOPS, 64)
    if form == "json":
        teacher.replicas[0]._api._form = JSON  # type: ignore[attr-defined]
    for theirs, ours in zip(views_of(teacher, groups, request_), views_of(local, groups, request_), strict=True):
        assert (theirs.rollout_id, theirs.context_digest) == (ours.rollout_id, ours.context_digest)
        for name in ("logprobs", "mass", "entropy", "stop_logmass"):
            np.testing.assert_allclose(getattr(theirs, name).numpy(), getattr(ours, name).numpy(), atol=2e-3, err_msg=name)
        assert theirs.support is not None
        assert ours.support is not None
        if ours.support.ids is not None:
            assert theirs.support.ids is not None
            np.testing.assert_array_equal(theirs.support.ids.numpy(), ours.support.ids.numpy())
        np.testing.assert_allclose(theirs.support.logprobs.numpy(), ours.support.logprobs.numpy(), rtol=2e-3, atol=2e-3)


def test_replicas_share_the_work_and_one_that_is_gone_costs_nothing(groups: list[Group]) -> None:
    with served(honest().app) as one:
        with served(honest().app) as two:
            teacher = met(one, two)
            before = views_of(teacher, groups, FULL)
            assert all(replica.trusted for replica in teacher.replicas), "each got its share"
        after = views_of(teacher, groups, FULL)
        assert [view.logprobs.numpy().tolist() for view in after] == [view.logprobs.numpy().tolist() for view in before]


def test_a_replica_that_comes_back_with_other_weights_is_not_asked(groups: list[Group], tmp_path: Path) -> None:
    port = free_port()
    with served(honest().app) as one:
        with served(honest().app, port) as two:
            teacher = open_teacher(one, two)
            probe(teacher, student_for(FULL), FULL, lambda told: None, wait_s=0.0)
            before = views_of(teacher, groups, FULL)
        views_of(teacher, groups, FULL)  # it is missed
        with served(honest(folder=perturbed(tmp_path / "other")).app, port):
            for _ in range(4):
                after = views_of(teacher, groups, FULL)
                time.sleep(0.3)
            assert [view.logprobs.numpy().tolist() for view in after] == [view.logprobs.numpy().tolist() for view in before]
            assert not teacher.replicas[1].trusted
            with pytest.raises(TeacherAway, match=r"is another teacher now: it scores an answer up to .* nats away"):
                asyncio.run_coroutine_threadsafe(teacher._recognise(teacher.replicas[1]), http_loop()).result()


def http_loop() -> asyncio.AbstractEventLoop:
    from streamopd.score import http

    return http._loop()


def student_for(request: EvidenceRequest):  # type: ignore[no-untyped-def]
    from streamopd.methods import load

    return student(load("forward_kl" if request.full else "default"))


def answering(score: object, **info: object):  # type: ignore[no-untyped-def]
    """A server that is honest about itself, and gives `score` to whoever asks for scores."""
    about = {"contract": 1, "model": "m", "vocab_size": 19, "max_tokens": 128} | info
    return servers.replying(info=about, score=score)


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (PlainTextResponse("upstream timed out", 500), "answers POST /score with 500: upstream timed out"),
        (JSONResponse({"error": "busy"}, 429, {"Retry-After": "0"}), "answers POST /score with 429: busy"),
        (PlainTextResponse("{}"), "with 'text/plain'; application/json was expected"),
        (servers.drip, "did not answer POST /score within 1 s"),
        (Response(b"[" + b"1," * 200_000 + b"1]", media_type=JSON), "answered with more than the"),
    ],
    ids=["500", "429", "text", "drip", "flood"],
)
def test_a_server_in_trouble_is_away_and_no_item_is_at_fault(groups: list[Group], score: Response, words: str) -> None:
    with served(answering(score)) as address, pytest.raises(TeacherAway, match=words):
        met(address, timeout_s=1.0, limit_s=8.0).score(groups, SAMPLED)


def test_a_server_that_hangs_costs_no_more_than_the_limit(groups: list[Group]) -> None:
    async def hang(request: object) -> Response:
        await asyncio.sleep(30)
        return JSONResponse({})

    with served(answering(hang)) as address:
        teacher, began_s = met(address, timeout_s=10.0, limit_s=1.5), time.monotonic()
        with pytest.raises(TeacherAway, match=r"scored 0 of 10 answers and then none for 1\.5 s"):
            teacher.score(groups, SAMPLED)
        assert time.monotonic() - began_s < 8, "the limit is of the whole call, not of each try"


def test_a_slow_server_that_goes_on_answering_is_not_away(groups: list[Group]) -> None:
    calls = []

    async def slow(request: Request) -> Response:
        calls.append(1)
        await asyncio.sleep(0.5)
        asked = (await request.json())["items"]
        return JSONResponse({"scores": [{"logprobs": [-1.0] * len(item["completion_ids"])} for item in asked]})

    with served(answering(slow)) as address:
        teacher = met(address, limit_s=1.2)
        teacher.token_budget = 16
        began_s = time.monotonic()
        assert len(views_of(teacher, groups, SAMPLED)) == 10
    assert len(calls) > 5
    assert time.monotonic() - began_s > 1.2, "or this shows nothing"


def test_whoever_waits_for_a_hanging_server_can_leave(groups: list[Group]) -> None:
    async def hang(request: object) -> Response:
        await asyncio.sleep(30)
        return JSONResponse({})

    class Leave(Exception):
        pass

    def leave() -> None:
        raise Leave

    with served(answering(hang)) as address:
        teacher = met(address, timeout_s=30.0, limit_s=30.0)
        teacher.moved = leave
        with pytest.raises(Leave):
            teacher.score(groups, SAMPLED)


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (Response(b"{not json", media_type=JSON), "what is no answer of the contract"),
        (JSONResponse({"scores": []}), "gave 0 scores for"),
        (JSONResponse({"scores": [{"logprobs": ["a"]}]}), "what is no answer of the contract"),
        (JSONResponse({"error": "item 0 is too long"}, 413), r"refuses POST /score \(413\): item 0 is too long"),
    ],
    ids=["garbage", "none", "mistyped", "refused"],
)
def test_an_answer_that_is_none_is_garbage_with_its_reason(groups: list[Group], score: Response, words: str) -> None:
    with served(answering(score)) as address, pytest.raises(GarbageRecord, match=words):
        met(address).score(groups, SAMPLED)


@pytest.mark.parametrize(("kind", "words"), [(servers.NotANumber, "hold nan"), (servers.Short, r"are \[\d+.*\], asked were \[\d+")])
@pytest.mark.parametrize("request_", [FULL, UNION, SAMPLED], ids=["full", "union", "sampled"])
def test_numbers_that_cannot_be_are_garbage(groups: list[Group], kind: type, words: str, request_: EvidenceRequest) -> None:
    with served(made(kind).app) as address, pytest.raises(GarbageRecord, match=words):
        met(address).score(groups, request_)


def test_an_entropy_that_is_no_number_is_garbage(groups: list[Group]) -> None:
    with served(made(servers.NoEntropy).app) as address, pytest.raises(GarbageRecord, match="entropy is nan at token 0"):
        views_of(met(address), groups, UNION)


def test_a_replica_that_gives_garbage_costs_nothing_beside_one_that_does_not(groups: list[Group]) -> None:
    with served(made(servers.NotANumber).app) as bad, served(honest().app) as good:
        teacher = met(bad, good)
        views = views_of(teacher, groups, SAMPLED)
        assert [view.logprobs.numpy().tolist() for view in views] == [
            view.logprobs.numpy().tolist() for view in views_of(met(good), groups, SAMPLED)
        ]


def test_too_much_at_once_is_asked_for_in_halves(groups: list[Group]) -> None:
    largest = []

    async def small(request: Request) -> Response:
        asked = (await request.json())["items"]
        if len(asked) > 2:
            return JSONResponse({"error": "at most 2 items"}, 413)
        largest.append(len(asked))
        return JSONResponse({"scores": [{"logprobs": [-1.0] * len(item["completion_ids"])} for item in asked]})

    with served(answering(small)) as address:
        assert len(views_of(met(address), groups, SAMPLED)) == 10
    assert max(largest) == 2


def test_a_busy_server_is_left_alone_for_as_long_as_it_says(groups: list[Group]) -> None:
    asked_s = []

    async def busy(request: Request) -> Response:
        asked_s.append(time.monotonic())
        if len(asked_s) == 1:
            return JSONResponse({"error": "busy"}, 429, {"Retry-After": "2"})
        asked = (await request.json())["items"]
        return JSONResponse({"scores": [{"logprobs": [-1.0] * len(item["completion_ids"])} for item in asked]})

    with served(answering(busy)) as address:
        assert views_of(met(address), groups[:1], SAMPLED)
    assert asked_s[-1] - asked_s[0] > 1.9


def test_brackets_in_brackets_are_garbage_and_nothing_worse(groups: list[Group]) -> None:
    deep = Response(b'{"scores":' + b"[" * 50_000, media_type=JSON)
    with served(answering(deep)) as address, pytest.raises(GarbageRecord, match="what is no answer of the contract"):
        met(address).score(groups, SAMPLED)


def test_a_teacher_that_contradicts_itself_is_garbage(groups: list[Group]) -> None:
    class Contradicting(servers.Changed):
        def change(self, score):  # type: ignore[no-untyped-def]
            import msgspec

            from streamopd.schemas import Array

            return msgspec.structs.replace(score, logprobs=Array.of(score.logprobs.numpy() - 1.0, "float32"))

    with served(made(Contradicting).app) as address, pytest.raises(GarbageRecord, match="has two log-probs at token"):
        met(address).score(groups, UNION)


def test_after_one_refusal_of_a_lone_server_nobody_asks_again(make_group: GroupMaker) -> None:
    asked = []

    async def refuse(request: object) -> Response:
        asked.append(1)
        return JSONResponse({"error": "no such key"}, 401)

    with served(answering(refuse)) as address, pytest.raises(TeacherRefuses, match="401: no such key"):
        met(address).score([make_group(0, (7,), vocab=19)], SAMPLED)  # one item is one request
    assert len(asked) == 1


def test_an_away_replica_rests_longer_each_time_and_no_longer_than_its_cap() -> None:
    replica = replicas.Replica("t", "http://127.0.0.1:9", "", 1.0, Contract())
    rests = []
    for _ in range(12):
        replica.away("is away")
        rests.append(replica.rests_s)
    assert rests[0] < 0.4
    assert all(rest <= 1.25 * replicas.LONGEST_REST_S for rest in rests)
    assert rests[-1] > 0.7 * replicas.LONGEST_REST_S
