"""A teacher beside the student in the engine: what is recorded replays from plain forwards of both, swaps and company or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from streamopd.generate.behave import geometric_blend, kl, spikes
from streamopd.generate.draws import REPLACEMENTS, uniforms
from streamopd.generate.engine import Answer, Request
from streamopd.generate.hf import HFEngine
from streamopd.generate.kernel import invert_cdf, kernel_logp
from streamopd.schemas import Author, Finish, Rollout, decode, encode
from streamopd.slots import Behaviour, Coin, GeometricBlend, Interleave, Mixture, OnPolicy, SwitchAtSpike, TeacherPrefix

from .conftest import POSITIONS, STOP, VOCABULARY, OpenEngine, Publish, answer_all, plain, requests, save_llama, student_logits

EVERY: list[Behaviour] = [
    Mixture(alpha=0.4), GeometricBlend(epsilon=0.1), Interleave(k=4), SwitchAtSpike(factor=1.3, window=3), TeacherPrefix(tokens=5.0),
    Coin(student=0.0), Coin(student=0.0, greedy=True),
]
KERNEL = {"temperature": 0.8, "top_p": 0.9}


@pytest.fixture
def open_pair(open_hf: OpenEngine, teacher_folder: Path) -> Callable[..., HFEngine]:
    def open_one(**values: object) -> HFEngine:
        return open_hf(**({"teacher": teacher_folder} | values))

    return open_one


def under(behaviours: list[Behaviour], todo: list[Request], context: bool = True) -> list[Request]:
    """The requests, one behaviour after the other, half of them with a longer or shorter context for the teacher."""
    own = [np.array(ids, np.int32) for ids in ([4], [7, 5, 11, 3, 9, 6, 14, 12, 8])]
    return [
        msgspec.structs.replace(
            request, behaviour=behaviours[i % len(behaviours)],
            teacher_prompt_ids=own[i // 2 % 2] if context and i % 2 else None,
        )
        for i, request in enumerate(todo)
    ]


@torch.inference_mode()
def teacher_logits(answer: Answer, teacher: PreTrainedModel) -> torch.Tensor:
    context = answer.request.context_ids.tolist()
    ids = torch.tensor([context + answer.completion_ids.tolist()])
    return teacher(input_ids=ids).logits[0, len(context) - 1 : -1]


def teachers_own(answer: Answer) -> NDArray[np.bool_]:
    """[G]: which tokens the teacher wrote."""
    own = np.zeros(len(answer.completion_ids), bool)
    for author in answer.authors:
        own[author.start :] = author.who == "teacher"
    return own


def replayed(answer: Answer, models: dict[int, PreTrainedModel], teacher: PreTrainedModel, **kernel: float) -> np.ndarray:
    """Log-probs [G] that ought to be recorded, in float64, from plain forwards and from who is said to have written what."""
    temperature, top_p = kernel.get("temperature", 1.0), kernel.get("top_p", 1.0)
    greedy = isinstance(answer.request.behaviour, Coin) and answer.request.behaviour.greedy
    p = kernel_logp(student_logits(answer, models).double(), temperature, top_p).exp().numpy()
    q = kernel_logp(teacher_logits(answer, teacher).double(), 1.0 if greedy else temperature, 1.0).exp().numpy()
    match answer.request.behaviour:
        case Mixture(alpha=alpha):
            mu = alpha * q + (1 - alpha) * p
        case GeometricBlend(epsilon=epsilon):
            with np.errstate(divide="ignore"):
                mu = geometric_blend(torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q)), epsilon)[1].exp().numpy()
        case Interleave(k=k):
            inside = np.zeros_like(p, bool)
            np.put_along_axis(inside, np.argsort(-q, -1)[:, :k], True, -1)
            mu = p * inside + (p * ~inside).sum(-1, keepdims=True) * q
        case _:
            mu = np.where(teachers_own(answer)[:, None], q, p)
    return np.log(mu[np.arange(len(mu)), answer.completion_ids])


def log_kernels(answer: Answer, folder: Path, teacher: Path, **kernel: float) -> tuple[torch.Tensor, torch.Tensor]:
    p = kernel_logp(student_logits(answer, {answer.spans[0].version: plain(folder)}), kernel["temperature"], kernel["top_p"])
    return p, kernel_logp(teacher_logits(answer, plain(teacher)), kernel["temperature"], 1.0)


# ---------------------------------------------------------------- what is recorded
@pytest.mark.parametrize("kernel", [{}, KERNEL], ids=["plain", "cut"])
def test_recorded_log_probs_replay_from_plain_forwards_of_both_models(
    open_pair: Callable[..., HFEngine], folder: Path, teacher_folder: Path, kernel: dict[str, float]
) -> None:
    answers = answer_all(open_pair(**kernel), under(EVERY, requests(42)), at_once=3)
    student, teacher = plain(folder), plain(teacher_folder)
    assert len(answers) == 42
    for answer in answers.values():
        np.testing.assert_allclose(answer.logprobs, replayed(answer, {-1: student}, teacher, **kernel), atol=2e-4)


@pytest.mark.parametrize("kv", ["keep", "recompute"])
def test_a_swap_in_flight_leaves_the_teachers_rows_as_they_are(
    open_pair: Callable[..., HFEngine], publish_shaken: Publish, teacher_folder: Path, tmp_path: Path, kv: str
) -> None:
    engine = open_pair(max_inflight=9, kv=kv)
    engine.swap_in(publish_shaken(0), tmp_path)
    answers, todo = [], under(EVERY, requests(21, max_new=24))
    for step in range(90):
        engine.admit([todo.pop() for _ in range(min(engine.free, len(todo), 4))])
        answers += engine.step()
        if step in (3, 4, 9, 14):
            engine.swap_in(publish_shaken(step), tmp_path)
    assert len(answers) == 21
    models = {n: plain(tmp_path / f"weight_v{n:06d}") for n in (0, 3, 4, 9, 14)}
    assert max(len(answer.spans) for answer in answers) >= 3
    for answer in answers:
        np.testing.assert_allclose(answer.logprobs, replayed(answer, models, plain(teacher_folder)), atol=2e-4)


def test_company_and_joining_time_change_no_answer_whatever_the_others_do(open_pair: Callable[..., HFEngine]) -> None:
    todo = under([OnPolicy(), *EVERY], requests(32))
    alone = answer_all(open_pair(max_inflight=1, **KERNEL), todo)
    crowd = answer_all(open_pair(max_inflight=32, **KERNEL), todo)
    trickle = answer_all(open_pair(max_inflight=5, **KERNEL), list(reversed(todo)), at_once=2)
    for name, answer in alone.items():
        for other in (crowd[name], trickle[name]):
            assert answer.completion_ids.tolist() == other.completion_ids.tolist()
            assert answer.authors == other.authors
            np.testing.assert_allclose(answer.logprobs, other.logprobs, atol=2e-5)


def test_a_teacher_that_nobody_needs_changes_no_bit(open_pair: Callable[..., HFEngine], open_hf: OpenEngine) -> None:
    todo, engine = requests(20), open_pair(**KERNEL)
    expected = answer_all(open_hf(**KERNEL), todo)
    for name, answer in answer_all(engine, todo).items():
        assert answer.completion_ids.tolist() == expected[name].completion_ids.tolist()
        assert (answer.logprobs == expected[name].logprobs).all()
        assert answer.authors == []


def test_the_record_says_who_wrote_which_tokens(open_pair: Callable[..., HFEngine]) -> None:
    whole, prefix = answer_all(open_pair(stop_ids=(), top_p=0.9), under([EVERY[-1], EVERY[4]], requests(2))).values()
    record = decode(Rollout, encode(whole.rollout()))
    assert (record.authors, record.temperature, record.top_p) == ([Author(0, "teacher")], 0.0, 1.0)
    record = decode(Rollout, encode(prefix.rollout()))
    assert (record.authors, record.temperature, record.top_p) == ([Author(0, "teacher"), Author(5, "student")], 1.0, 0.9)


# ---------------------------------------------------------------- one behaviour after the other
def test_interleaving_over_the_whole_vocabulary_is_the_student_to_the_bit(open_pair: Callable[..., HFEngine]) -> None:
    todo = requests(16)
    expected = answer_all(open_pair(**KERNEL), todo)
    for name, answer in answer_all(open_pair(**KERNEL), under([Interleave(k=VOCABULARY)], todo)).items():
        assert answer.completion_ids.tolist() == expected[name].completion_ids.tolist()
        assert (answer.logprobs == expected[name].logprobs).all()
        assert answer.authors == []


def test_replaced_tokens_are_the_teachers_and_what_was_proposed_lay_outside_its_top_k(
    open_pair: Callable[..., HFEngine], folder: Path, teacher_folder: Path
) -> None:
    seen = set()
    for answer in answer_all(open_pair(**KERNEL), under([Interleave(k=4)], requests(12))).values():
        p, q = log_kernels(answer, folder, teacher_folder, **KERNEL)
        first, second = (uniforms(answer.request.seed, 20, purpose)[: len(p)] for purpose in (0, REPLACEMENTS))
        proposed = invert_cdf(p.exp(), torch.from_numpy(first)).numpy()
        anew = invert_cdf(q.exp(), torch.from_numpy(second)).numpy()
        likely = q.topk(4, -1).indices.numpy()
        replaced = np.array([token not in row for token, row in zip(proposed, likely, strict=True)])
        assert teachers_own(answer).tolist() == replaced.tolist()
        assert answer.completion_ids.tolist() == np.where(replaced, anew, proposed).tolist()
        seen |= set(replaced.tolist())
    assert seen == {True, False}


def test_a_row_switches_at_its_first_spike_and_stays_with_the_teacher(
    open_pair: Callable[..., HFEngine], folder: Path, teacher_folder: Path
) -> None:
    switched = 0
    setting = SwitchAtSpike(factor=1.3, window=3)
    for answer in answer_all(open_pair(**KERNEL), under([setting], requests(20))).values():
        divergence = kl(*log_kernels(answer, folder, teacher_folder, **KERNEL)).tolist()
        spike = next((i for i, d in enumerate(divergence) if spikes(d, divergence[max(0, i - 3) : i], 1.3, 3)), None)
        assert teachers_own(answer).tolist() == [spike is not None and i >= spike for i in range(len(divergence))]
        switched += spike is not None
    assert 0 < switched < 20


def test_the_teacher_writes_the_first_tokens_and_then_costs_nothing(open_pair: Callable[..., HFEngine]) -> None:
    engine = open_pair(stop_ids=())
    engine.admit(under([TeacherPrefix(tokens=5.0)], requests(3)))
    advanced = []
    assert engine._coauthor is not None
    advance = engine._coauthor._decoder.advance
    engine._coauthor._decoder.advance = lambda ids, lengths: advanced.append(1) or advance(ids, lengths)  # type: ignore[method-assign]
    for answer in answer_all(engine, []).values():
        assert answer.authors == [Author(0, "teacher"), Author(5, "student")]
    assert len(advanced) == 5


def test_a_greedy_teacher_writes_its_likeliest_tokens_for_its_own_context(open_pair: Callable[..., HFEngine], teacher_folder: Path) -> None:
    teacher = plain(teacher_folder)
    for answer in answer_all(open_pair(temperature=0.7), under([Coin(student=0.0, greedy=True)], requests(8))).values():
        assert answer.completion_ids.tolist() == teacher_logits(answer, teacher).argmax(-1).tolist()
        assert answer.authors == [Author(0, "teacher")]


@pytest.mark.parametrize("behaviour", [Mixture(alpha=0.4), Interleave(k=3)])
def test_first_tokens_follow_the_distribution_that_is_recorded(
    open_pair: Callable[..., HFEngine], folder: Path, teacher_folder: Path, behaviour: Behaviour
) -> None:
    prompt, count = np.array([5, 9, 4], np.int32), 3000
    todo = [Request(f"p{i}.0", prompt, (11, i), 1, behaviour=behaviour) for i in range(count)]
    answers = answer_all(open_pair(max_inflight=500), todo).values()
    seen = np.bincount([int(answer.completion_ids[0]) for answer in answers], minlength=VOCABULARY)
    with torch.inference_mode():
        p, q = (plain(where)(input_ids=torch.tensor([prompt.tolist()])).logits[0, -1].double().softmax(-1).numpy()
                for where in (folder, teacher_folder))
    inside = np.isin(np.arange(VOCABULARY), np.argsort(-q)[:3])
    mu = 0.4 * q + 0.6 * p if isinstance(behaviour, Mixture) else p * inside + p[~inside].sum() * q
    expected = mu * count
    enough = expected > 5
    chi_square = ((seen - expected)[enough] ** 2 / expected[enough]).sum()
    assert chi_square < enough.sum() + 4 * np.sqrt(2 * enough.sum())


# ---------------------------------------------------------------- what does not fit
def test_a_context_that_the_teacher_cannot_read_is_answered_with_its_error(open_pair: Callable[..., HFEngine]) -> None:
    long = np.full(POSITIONS, 3, np.int32)
    bad = Request("bad", np.array([3], np.int32), (0,), 5, Mixture(), long)
    answers = answer_all(open_pair(), [bad, *under(EVERY, requests(3))])
    assert answers["bad"].error == f"{POSITIONS} prompt and 5 new tokens are more than the teacher's {POSITIONS} positions."
    assert answers["p1.0"].finish is not Finish.ERROR


@pytest.mark.parametrize("vocabulary", [VOCABULARY - 4, VOCABULARY + 5])
def test_ids_that_only_one_head_has_are_never_written_while_both_are_at_work(open_hf: OpenEngine, tmp_path: Path, vocabulary: int) -> None:
    """Heads are padded, and not always alike."""
    teacher = save_llama(tmp_path, tied=False, seed=6, vocabulary=vocabulary)
    known = min(vocabulary, VOCABULARY)
    todo = [msgspec.structs.replace(r, prompt_ids=r.prompt_ids.clip(max=known - 1)) for r in under(EVERY, requests(21), context=False)]
    for answer in answer_all(open_hf(teacher=teacher), todo).values():
        assert answer.finish is not Finish.ERROR
        shared = answer.completion_ids[:5] if isinstance(answer.request.behaviour, TeacherPrefix) else answer.completion_ids
        assert shared.max() < known


def test_weights_of_nan_end_blended_answers_and_poison_nobody_afterwards(
    open_pair: Callable[..., HFEngine], publish_shaken: Publish, tmp_path: Path
) -> None:
    engine = open_pair()
    engine.swap_in(publish_shaken(1, fill=float("nan")), tmp_path)
    for answer in answer_all(engine, under(EVERY[:3], requests(8))).values():
        assert answer.finish is Finish.ERROR
        assert answer.error == "The model's logits under weights 1, or the teacher's beside it, are not finite."
    good, fresh = publish_shaken(2), open_pair()
    for each in (engine, fresh):
        each.swap_in(good, tmp_path)
    expected = answer_all(fresh, under(EVERY, requests(8, first=8)))
    for name, answer in answer_all(engine, under(EVERY, requests(8, first=8))).items():
        assert answer.completion_ids.tolist() == expected[name].completion_ids.tolist()


def test_a_teacher_that_overflowed_once_poisons_nobody_afterwards(open_pair: Callable[..., HFEngine]) -> None:
    engine, todo = open_pair(), under(EVERY, requests(8))
    expected = answer_all(open_pair(), todo)
    assert engine._coauthor is not None
    keys = engine._coauthor._model.get_parameter("model.layers.1.self_attn.k_proj.weight")
    kept = keys.clone()
    keys.fill_(float("nan"))
    for answer in answer_all(engine, under(EVERY, requests(8, first=8))).values():
        assert answer.finish is Finish.ERROR
    keys.copy_(kept)
    for name, answer in answer_all(engine, todo).items():
        assert answer.completion_ids.tolist() == expected[name].completion_ids.tolist()


def test_an_engine_without_a_teacher_is_not_asked_for_one(open_hf: OpenEngine) -> None:
    with pytest.raises(AssertionError, match="opened without one"):
        open_hf().admit(under([Mixture()], requests(1)))


def test_what_was_aborted_may_be_asked_again(open_pair: Callable[..., HFEngine]) -> None:
    engine, todo = open_pair(max_inflight=8), under(EVERY, requests(7))
    expected = answer_all(open_pair(max_inflight=8), todo)
    engine.admit(todo)
    assert len(engine.step()) + len(engine.abort()) == 7
    for name, answer in answer_all(engine, todo).items():
        assert answer.completion_ids.tolist() == expected[name].completion_ids.tolist()
        assert STOP not in answer.completion_ids[:-1]
