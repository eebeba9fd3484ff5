"""Other people's servers as teachers: they say what a local teacher says, or as much of it as they can, and no more is made of it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import numpy as np
import pytest
from msgspec.structs import replace
from starlette.applications import Starlette

from streamopd.assets import resolve
from streamopd.assets.vocabulary import texts
from streamopd.errors import GarbageRecord, TeacherError
from streamopd.methods import load
from streamopd.schemas import Array, Evidence, Group
from streamopd.schemas.teaching import TeacherInfo
from streamopd.score.answer import possible_of
from streamopd.score.http import HttpTeacher
from streamopd.score.local import LocalTeacher
from streamopd.score.probe import probe
from streamopd.slots import EvidenceRequest
from tests.score.servers import MODEL, served
from tests.score.strangers import Stranger, Table, completions, sglang, vllm
from tests.score.test_http import GroupMaker, groups, views_of  # noqa: F401  a fixture
from tests.score.test_local import FULL, SAMPLED, UNION
from tests.score.test_probe import STOPS, student

OWN = EvidenceRequest(full=False, teacher_k=UNION.teacher_k, student_ids=False, sampled=True, stop=False)
ALONE = EvidenceRequest(full=False, teacher_k=0, student_ids=False, sampled=True, stop=False)

Make = Callable[..., Starlette]


def with_ids(stranger: Stranger) -> Starlette:
    return vllm(stranger, scores_ids=True)


def echo_ids(stranger: Stranger) -> Starlette:
    return completions(stranger, knows_ids=True)


def echo_texts(stranger: Stranger) -> Starlette:
    return completions(stranger, knows_ids=False)


def met(url: str, api: str) -> HttpTeacher:
    teacher = HttpTeacher("default", [url], STOPS, 64, timeout_s=10.0, api=api, ids=19)
    teacher.meet()
    return teacher


def local() -> LocalTeacher:
    return LocalTeacher(resolve(MODEL), "default", "float32", STOPS, 64)


@pytest.mark.parametrize(
    ("api", "make", "asked", "given"),
    [
        ("vllm", vllm, FULL, FULL), ("vllm", vllm, SAMPLED, SAMPLED), ("vllm", vllm, UNION, OWN), ("vllm", with_ids, UNION, UNION),
        ("sglang", sglang, FULL, FULL), ("sglang", sglang, SAMPLED, SAMPLED), ("sglang", sglang, UNION, OWN),
        ("completions", echo_ids, UNION, OWN), ("completions", echo_texts, UNION, ALONE),
    ],
)
def test_it_says_what_a_local_teacher_says_as_far_as_it_can(
    groups: list[Group], api: str, make: Make, asked: EvidenceRequest, given: EvidenceRequest  # noqa: F811
) -> None:
    with served(make(Stranger())) as url:
        theirs_all = views_of(met(url, api), groups, asked)
    for theirs, ours in zip(theirs_all, views_of(local(), groups, given), strict=True):
        same_view(theirs, ours)


def same_view(theirs: Evidence, ours: Evidence) -> None:
    assert (theirs.rollout_id, theirs.context_digest) == (ours.rollout_id, ours.context_digest)
    for name in ("logprobs", "mass", "entropy", "stop_logmass"):
        if (said := getattr(theirs, name)) is not None:
            np.testing.assert_allclose(said.numpy(), getattr(ours, name).numpy(), atol=2e-3, err_msg=name)
    assert theirs.support is not None
    assert ours.support is not None
    if ours.support.ids is not None:
        assert theirs.support.ids is not None
        np.testing.assert_array_equal(theirs.support.ids.numpy(), ours.support.ids.numpy())
    np.testing.assert_allclose(theirs.support.logprobs.numpy(), ours.support.logprobs.numpy(), rtol=2e-3, atol=2e-3)


# ---------------------------------------------------------------- the probe
def found(url: str, api: str, method: str, evidence: EvidenceRequest | None = None) -> str:
    teacher, told = HttpTeacher("default", [url], STOPS, 512, timeout_s=10.0, api=api, ids=19), []  # type: ignore[var-annotated]
    chosen = load(method)
    probe(teacher, student(chosen), evidence or chosen.evidence, told.append, wait_s=0.0)
    return "\n".join(told)


@pytest.mark.parametrize(
    ("api", "make", "method", "words"),
    [
        ("vllm", vllm, "forward_kl", "own ids a token: any number"),
        ("vllm", vllm, "default", "any number; it cannot score the student's top ids and stop ids: the support is its own top ids and the"),
        ("sglang", sglang, "default", "it cannot score the student's top ids and stop ids"),
        ("completions", echo_ids, "default", "it cannot score the student's top ids and stop ids"),
        ("completions", echo_texts, "default", "a token: none; it cannot score the student's top ids and stop ids and its own top 16"),
    ],
)
def test_what_a_method_loses_is_said_aloud(api: str, make: Make, method: str, words: str) -> None:
    with served(make(Stranger())) as url:
        told = found(url, api, method)
    assert words in told
    assert "19 of the student's 19 ids decode to the same there" in told
    assert "3 planted changes seen where they were planted" in told


def test_a_method_that_renormalises_is_not_shrunk_in_silence() -> None:
    """Over the sampled token alone its loss would be zero for ever."""
    renormalised = replace(load("default").evidence, tail=False)
    with served(vllm(Stranger())) as url, pytest.raises(TeacherError, match="over fewer ids it would be another loss"):
        found(url, "vllm", "default", renormalised)


@pytest.mark.parametrize(("api", "make"), [("sglang", sglang), ("completions", echo_ids)])
def test_a_server_that_does_not_know_the_students_highest_id_is_refused_and_not_waited_for(api: str, make: Make) -> None:
    with served(make(Stranger())) as url:
        teacher = HttpTeacher("default", [url], STOPS, 64, timeout_s=10.0, api=api, ids=30)
        with pytest.raises(TeacherError, match="does not take id 29, the student's highest"):
            teacher.meet()


def test_a_support_is_never_empty() -> None:
    info = TeacherInfo(contract=1, model="", vocab_size=19, max_tokens=99, max_topk=-1, scores_ids=False)
    asked = EvidenceRequest(full=False, teacher_k=0, student_ids=True, sampled=False, stop=True)
    assert possible_of(asked, info, "default") == ALONE


def test_what_was_measured_once_is_not_measured_again(groups: list[Group]) -> None:  # noqa: F811
    stranger = Stranger(cap=7)
    with served(vllm(stranger)) as url:
        teacher = met(url, "vllm")
        before = stranger.asked
        teacher.replicas[0].trusted = False
        teacher.meet()
    assert stranger.asked == before > 20


def npy(array: Table, head: int = 10**9) -> str:
    body = io.BytesIO()
    np.save(body, array, allow_pickle=False)
    return base64.b64encode(body.getvalue()[:head]).decode()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (base64.b64encode(b"PK\x03\x04" * 9).decode(), "that are no array"),
        (npy(np.zeros((7, 4), np.float32)), r"float32\[7, 4\], 112 bytes; asked were \[7, "),
        (npy(np.zeros((2**12, 2**12), np.float32), head=128), r"float32\[4096, 4096\], 0 bytes"),
        (npy(np.zeros((7, 18), np.float64)), "float64"),
        ("%%%", "that are no array"),
        (None, "that are no array"),
    ],
)
def test_an_array_that_is_none_is_garbage_and_takes_no_memory(make_group: GroupMaker, told: str | None, words: str) -> None:
    stranger = Stranger()
    stranger.says = {"prompt_token_id_logprobs": told}
    with served(vllm(stranger, scores_ids=True)) as url, pytest.raises(GarbageRecord, match=words):
        met(url, "vllm").score([make_group(0, (7,), vocab=19)], UNION)


@pytest.mark.parametrize("index", [2**40, -1, 19])
def test_an_id_that_nobody_has_is_garbage(make_group: GroupMaker, index: int) -> None:
    stranger = Stranger()
    row = {str(i): {"logprob": -3.0} for i in range(19)} | {str(index): {"logprob": -0.1}}
    stranger.says = {"choices": [{"index": 0, "prompt_logprobs": [None, *[row] * 11]}]}
    with served(vllm(stranger)) as url, pytest.raises(GarbageRecord, match=f"names id {index}, its vocabulary has 19"):
        met(url, "vllm").score([make_group(0, (7,), vocab=19)], OWN)


def test_ids_that_the_student_chose_are_scored_where_the_server_can() -> None:
    with served(vllm(Stranger(), scores_ids=True)) as url:
        told = found(url, "vllm", "default")
    assert "own ids a token: any number\n" in told
    assert "stop ids: between" in told


@pytest.mark.parametrize(("api", "make"), [("vllm", vllm), ("completions", echo_ids)])
def test_a_cap_is_measured_and_named_when_it_is_too_low(api: str, make: Make) -> None:
    with served(make(Stranger(cap=7))) as url:
        assert met(url, api).info.max_topk == 7  # type: ignore[union-attr]
        with pytest.raises(TeacherError, match="at most 7 log-probs a token; this method asks for 16"):
            found(url, api, "default")
        with pytest.raises(TeacherError, match="asks for the whole vocabulary"):
            found(url, api, "forward_kl")


def shifted(table: Table) -> Table:
    return np.concatenate([table[:1], table[:-1]])


def not_a_number(table: Table) -> Table:
    return np.where(np.arange(len(table))[:, None] == 9, np.nan, table)


@pytest.mark.parametrize(("api", "make"), [("vllm", vllm), ("sglang", sglang), ("completions", echo_ids)])
def test_rows_that_are_one_token_off_are_found_out(api: str, make: Make) -> None:
    with served(make(Stranger(change=shifted))) as url, pytest.raises(TeacherError, match="too late"):
        found(url, api, "default")


@pytest.mark.parametrize(("api", "make"), [("vllm", vllm), ("sglang", sglang), ("completions", echo_ids)])
def test_another_tokenizer_is_named_by_its_first_id(api: str, make: Make) -> None:
    other = {index: "Z" if index == 7 else text for index, text in texts(resolve(MODEL)).items()}
    with served(make(Stranger(vocabulary=other))) as url, pytest.raises(TeacherError, match="disagree on 1 of 19 ids, the first is 7: 'Z'"):
        found(url, api, "default")


def without_id_3(table: Table) -> Table:
    rest = np.where(np.arange(19) == 3, -np.inf, table)
    return rest - np.log(np.exp(rest).sum(1, keepdims=True))


def test_minus_infinity_is_never_and_no_garbage(groups: list[Group]) -> None:  # noqa: F811
    """vLLM writes it as -9999."""
    with served(vllm(Stranger(change=without_id_3))) as url:
        views = views_of(met(url, "vllm"), groups, FULL)
    assert all(float(view.support.logprobs.numpy()[:, 3].max()) <= -9000 for view in views if view.support)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"choices": []}, "gave prompt_logprobs of lengths"),
        ({"choices": [{"index": 0, "prompt_logprobs": [None] * 12}]}, "has no log-prob of id"),
        ({"choices": [{"index": 0, "prompt_logprobs": [None, *[{"99": {"logprob": -1.0}}] * 11]}]}, "has no log-prob of id"),
        ({"choices": "none"}, "with what cannot be read"),
    ],
)
def test_what_vllm_would_not_say_is_garbage(make_group: GroupMaker, reply: dict[str, object], words: str) -> None:
    group, stranger = make_group(0, (7,), vocab=19), Stranger()
    assert len(group.prompt.prompt_ids) + len(group.rollouts[0].completion_ids) == 12
    stranger.says = reply
    with served(vllm(stranger)) as url, pytest.raises(GarbageRecord, match=words):
        met(url, "vllm").score([group], FULL)


def test_the_words_of_a_refusal_are_repeated(make_group: GroupMaker) -> None:
    group = make_group(0, (7,), vocab=19)
    too_long = replace(group, prompt=replace(group.prompt, prompt_ids=Array.of(np.full(130, 4), "int32"), teacher_prompt_ids=None))
    too_long.rollouts[0] = replace(too_long.rollouts[0], prompt_ids=too_long.prompt.prompt_ids)
    with served(vllm(Stranger())) as url:
        teacher = met(url, "vllm")
        assert teacher.info is not None
        assert teacher.info.max_tokens == 127
        with pytest.raises(GarbageRecord, match="the model takes 127 and writes one"):
            teacher.score([too_long], SAMPLED)
