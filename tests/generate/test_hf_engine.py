"""The engine on transformers: answers, their purity, their records, and weights that change under way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, PreTrainedModel

from streamopd.errors import SwapRefused, UserError
from streamopd.generate.engine import Answer, Request
from streamopd.schemas import Finish, Rollout, Span, decode, encode

from .conftest import POSITIONS, STOP, VOCABULARY, OpenEngine, Publish, answer_all, plain, requests, student_logits


def logprobs_of(model: PreTrainedModel, answer: Answer) -> np.ndarray:
    """Of each completion token, by one plain forward."""
    return replay(answer, {answer.spans[0].version: model})


def replay(answer: Answer, models: dict[int, PreTrainedModel]) -> np.ndarray:
    """Log-probs [G] at temperature 1."""
    logp_GV = student_logits(answer, models).log_softmax(-1)
    return logp_GV.gather(-1, torch.tensor(answer.completion_ids.tolist())[:, None]).squeeze(-1).numpy()


# ---------------------------------------------------------------- what an answer is
def test_recorded_log_probs_are_those_of_a_plain_forward(open_hf: OpenEngine, folder: Path) -> None:
    answers = answer_all(open_hf(), requests(20), at_once=3)
    model = plain(folder)
    for answer in answers.values():
        np.testing.assert_allclose(answer.logprobs, logprobs_of(model, answer), atol=1e-4)


def test_greedy_answers_are_the_argmax_of_a_plain_forward(open_hf: OpenEngine, folder: Path) -> None:
    model = plain(folder)
    for answer in answer_all(open_hf(temperature=0.0), requests(6)).values():
        ids = torch.tensor([answer.request.prompt_ids.tolist() + answer.completion_ids.tolist()])
        with torch.inference_mode():
            best = model(input_ids=ids).logits[0, len(answer.request.prompt_ids) - 1 : -1].argmax(-1)
        assert best.tolist() == answer.completion_ids.tolist()


def test_an_answer_ends_with_its_stop_id_or_at_its_limit(open_hf: OpenEngine) -> None:
    answers = answer_all(open_hf(), requests(40)).values()
    assert {answer.finish for answer in answers} == {Finish.STOP, Finish.LENGTH}
    for answer in answers:
        ids = answer.completion_ids.tolist()
        stops = [at for at, token in enumerate(ids) if token == STOP]
        assert stops == ([len(ids) - 1] if answer.finish is Finish.STOP else [])
        assert answer.finish is Finish.STOP or len(ids) == 20


@pytest.mark.parametrize("kernel", [{}, {"temperature": 0.7, "top_p": 0.8}])
def test_company_and_joining_time_do_not_change_an_answer(open_hf: OpenEngine, kernel: dict[str, float]) -> None:
    todo = requests(24)
    alone = answer_all(open_hf(max_inflight=1, **kernel), todo)
    crowd = answer_all(open_hf(max_inflight=24, **kernel), todo)
    trickle = answer_all(open_hf(max_inflight=5, **kernel), list(reversed(todo)), at_once=2)
    for name, answer in alone.items():
        for other in (crowd[name], trickle[name]):
            assert answer.completion_ids.tolist() == other.completion_ids.tolist()
            np.testing.assert_allclose(answer.logprobs, other.logprobs, atol=1e-5)


def test_a_longer_request_that_joins_leaves_the_others_as_they_were(open_hf: OpenEngine) -> None:
    short, long = requests(2, max_new=12, prompt=3), requests(2, max_new=70, first=2)
    alone = answer_all(open_hf(stop_ids=()), short + long)
    engine = open_hf(max_inflight=4, stop_ids=())
    engine.admit(short)
    for _ in range(6):
        assert engine.step() == []
    for name, answer in answer_all(engine, long).items():
        assert answer.completion_ids.tolist() == alone[name].completion_ids.tolist()
        np.testing.assert_allclose(answer.logprobs, alone[name].logprobs, atol=1e-5)


def test_first_tokens_follow_the_models_distribution(open_hf: OpenEngine, folder: Path) -> None:
    prompt, count = np.array([5, 9, 4], np.int32), 3000
    todo = [Request(f"p{i}.0", prompt, (11, i), 1) for i in range(count)]
    answers = answer_all(open_hf(max_inflight=500), todo).values()
    seen = np.bincount([int(answer.completion_ids[0]) for answer in answers], minlength=VOCABULARY)
    with torch.inference_mode():
        expected = plain(folder)(input_ids=torch.tensor([prompt.tolist()])).logits[0, -1].double().softmax(-1).numpy() * count
    enough = expected > 5
    chi_square = ((seen - expected)[enough] ** 2 / expected[enough]).sum()
    assert chi_square < enough.sum() + 4 * np.sqrt(2 * enough.sum())


def test_the_students_own_top_k_is_of_the_unmodified_distribution(open_hf: OpenEngine, folder: Path) -> None:
    model = plain(folder)
    for answer in answer_all(open_hf(student_k=4, temperature=0.6, top_p=0.7), requests(6)).values():
        ids = torch.tensor([answer.request.prompt_ids.tolist() + answer.completion_ids.tolist()])
        with torch.inference_mode():
            logp = model(input_ids=ids).logits[0, len(answer.request.prompt_ids) - 1 : -1].log_softmax(-1)
        best = logp.topk(4, -1)
        assert (answer.topk_ids == best.indices.numpy()).all()
        np.testing.assert_allclose(answer.topk_logprobs, best.values.numpy(), atol=2e-3)


def test_an_answer_makes_a_record_that_survives_the_wire(open_hf: OpenEngine) -> None:
    (answer,) = answer_all(open_hf(student_k=3, temperature=0.9), requests(1)).values()
    record = decode(Rollout, encode(answer.rollout()))
    assert record.id == "p0.0"
    assert (record.temperature, record.top_p, record.finish) == (0.9, 1.0, answer.finish)
    assert (record.completion_ids.numpy() == answer.completion_ids).all()
    assert record.student_topk is not None
    assert record.student_topk.logprobs.shape == (len(record.completion_ids), 3)


def test_the_bfloat16_engine_answers_near_the_float32_model(open_hf: OpenEngine, folder: Path) -> None:
    model = plain(folder)
    for answer in answer_all(open_hf(dtype="bfloat16"), requests(4)).values():
        assert np.abs(answer.logprobs - logprobs_of(model, answer)).mean() < 0.1


def test_a_model_with_learned_positions_is_served_as_well(open_hf: OpenEngine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = plain(tmp_path)
    for answer in answer_all(open_hf(tmp_path), requests(9), at_once=2).values():
        np.testing.assert_allclose(answer.logprobs, logprobs_of(model, answer), atol=1e-4)


# ---------------------------------------------------------------- what is refused
def test_a_sliding_window_is_refused_when_the_engine_opens(open_hf: OpenEngine, tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=8,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"mistral model with DynamicSlidingWindowLayer cache layers.*full attention"):
        open_hf(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "max_new", "words"),
    [
        ([], 5, "0 prompt tokens"),
        ([3, VOCABULARY], 5, f"from 3 to {VOCABULARY}; the model has {VOCABULARY}"),
        ([3] * 90, 7, f"90 prompt and 7 new tokens are more than the model's {POSITIONS}"),
    ],
)
def test_what_cannot_be_served_is_answered_with_its_error(
    open_hf: OpenEngine, prompt: list[int], max_new: int, words: str
) -> None:
    bad = Request("bad", np.array(prompt, np.int32), (0,), max_new)
    answers = answer_all(open_hf(), [bad, *requests(2)])
    assert answers["bad"].finish is Finish.ERROR
    assert words in answers["bad"].error
    assert answers["bad"].rollout().completion_ids.shape == (0,)
    assert answers["p1.0"].finish is not Finish.ERROR


def test_more_than_the_free_slots_cannot_be_admitted(open_hf: OpenEngine) -> None:
    engine = open_hf(max_inflight=3)
    engine.admit(requests(2))
    assert (engine.inflight, engine.free) == (2, 1)
    with pytest.raises(AssertionError, match="2 requests for 1 free"):
        engine.admit(requests(2, first=2))


def test_weights_of_nan_end_answers_with_an_error_and_poison_nobody_afterwards(
    open_hf: OpenEngine, publish_shaken: Publish, tmp_path: Path
) -> None:
    engine = open_hf()
    engine.swap_in(publish_shaken(1, fill=float("nan")), tmp_path)
    for answer in answer_all(engine, requests(8)).values():
        assert answer.finish is Finish.ERROR
        assert "weights 1 are not finite" in answer.error
    good = publish_shaken(2)
    engine.swap_in(good, tmp_path)
    fresh = open_hf()
    fresh.swap_in(good, tmp_path)
    expected = answer_all(fresh, requests(8, first=8))
    for name, answer in answer_all(engine, requests(8, first=8)).items():
        assert answer.completion_ids.tolist() == expected[name].completion_ids.tolist()


def test_abort_drops_what_is_in_flight_and_the_engine_goes_on(open_hf: OpenEngine) -> None:
    engine = open_hf(max_inflight=4, stop_ids=())
    todo = requests(4)
    expected = answer_all(open_hf(stop_ids=()), todo)
    engine.admit(todo)
    engine.step()
    assert {request.id for request in engine.abort()} == {request.id for request in todo}
    assert (engine.inflight, engine.free, engine.step()) == (0, 4, [])
    for name, answer in answer_all(engine, todo).items():
        assert answer.completion_ids.tolist() == expected[name].completion_ids.tolist()


# ---------------------------------------------------------------- weights that change between two tokens
@pytest.mark.parametrize("kv", ["keep", "recompute"])
@pytest.mark.parametrize("tied", [True, False])
def test_answers_across_swaps_replay_by_the_rule_their_spans_state(
    open_hf: OpenEngine, publish_shaken: Publish, folder: Path, untied_folder: Path, tmp_path: Path, kv: str, tied: bool
) -> None:
    where = folder if tied else untied_folder
    engine = open_hf(where, max_inflight=12, kv=kv)
    engine.swap_in(publish_shaken(0, where), tmp_path)
    answers, todo = [], requests(16, max_new=24)
    for step in range(60):
        engine.admit([todo.pop() for _ in range(min(engine.free, len(todo), 5))])
        answers += engine.step()
        if step in (3, 4, 9, 14):
            swapped = engine.swap_in(publish_shaken(step, where), tmp_path)
            assert (swapped.version, engine.version) == (step, step)
    assert len(answers) == 16
    models = {n: plain(tmp_path / f"weight_v{n:06d}") for n in (0, 3, 4, 9, 14)}
    assert max(len(answer.spans) for answer in answers) >= 3
    for answer in answers:
        assert {span.kv for span in answer.spans[1:]} <= {kv}
        np.testing.assert_allclose(answer.logprobs, replay(answer, models), atol=1e-4)


def test_keeping_and_recomputing_differ_so_the_replay_can_tell_them_apart(
    open_hf: OpenEngine, publish_shaken: Publish, tmp_path: Path
) -> None:
    found = {}
    for kv in ("keep", "recompute"):
        engine = open_hf(temperature=0.0, kv=kv, stop_ids=())
        engine.admit(requests(1, max_new=4, first=3))
        engine.step()
        engine.swap_in(publish_shaken(1), tmp_path)
        (answer,) = answer_all(engine, []).values()
        found[kv] = answer.logprobs
    assert np.abs(found["keep"][1] - found["recompute"][1]) > 1e-3


def test_two_swaps_without_a_token_between_leave_one_span(
    open_hf: OpenEngine, publish_shaken: Publish, tmp_path: Path
) -> None:
    engine = open_hf(stop_ids=())
    engine.admit([Request("a", np.array([5], np.int32), (1,), 3)])
    engine.step()
    assert engine.swap_in(publish_shaken(1), tmp_path).inflight == 1
    engine.swap_in(publish_shaken(2), tmp_path)
    (answer,) = answer_all(engine, []).values()
    assert answer.spans == [Span(0, -1), Span(1, 2)]


def test_a_refused_swap_leaves_the_old_version_served(open_hf: OpenEngine, publish_shaken: Publish, tmp_path: Path) -> None:
    engine = open_hf()
    engine.swap_in(publish_shaken(1), tmp_path)
    before = engine.probe([3, 4, 5, 6])
    weights = publish_shaken(2)
    file = tmp_path / weights.folder / "model.safetensors"
    body = bytearray(file.read_bytes())
    body[-5] ^= 1
    file.write_bytes(body)
    with pytest.raises(SwapRefused):
        engine.swap_in(weights, tmp_path)
    assert engine.version == 1
    assert (engine.probe([3, 4, 5, 6]) == before).all()


def test_a_probe_is_a_plain_forward_and_disturbs_nothing(open_hf: OpenEngine, folder: Path) -> None:
    todo, ids = requests(5), [4, 8, 15, 16, 3, 7, 11]
    expected, engine = answer_all(open_hf(), todo), open_hf()
    engine.admit(todo)
    answers = engine.step()
    with torch.inference_mode():
        logp = plain(folder)(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    np.testing.assert_allclose(engine.probe(ids), logp[range(6), ids[1:]], atol=1e-5)
    for answer in [*answers, *answer_all(engine, []).values()]:
        assert answer.completion_ids.tolist() == expected[answer.request.id].completion_ids.tolist()
