"""vLLM for real, on the CPU: swaps with requests in flight, log-probs of the weights they name, and the failure that is silent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from streamopd.errors import ConfigError, SwapRefused, TornWeights
from streamopd.generate.engine import Answer, Request
from streamopd.generate.open import open_engine
from streamopd.schemas import Finish, Weights
from streamopd.sync.adapter import Form
from streamopd.sync.drill import drill
from streamopd.sync.publish import publish
from streamopd.sync.swap import Loader

from .conftest import student_logits

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
os.environ["CXX"] = "/nonexistent"  # a slim image has no compiler

STOP, VOCAB, PROMPT = 2, 96, np.array([5, 17, 33, 8], np.int32)
PROBE = [5, 17, 33, 8, 60, 41, 7, 19, 88, 3]
LONG = [np.random.default_rng(seed).integers(3, VOCAB, 400).astype(np.int32) for seed in range(6)]
BLOCK = 128  # tokens whose keys and values are shared or not, on a CPU; a prompt's last token is never shared
NEAR = 1e-3


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=512, initializer_range=0.15, pad_token_id=0, eos_token_id=STOP,
        tie_word_embeddings=request.param == "tied",
    )
    path = tmp_path_factory.mktemp(request.param)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Any:
    """One for all tests of a model: opening it takes seconds."""
    return open_engine("vllm", folder=folder, stop_ids=(STOP,), loader=Loader(folder), max_inflight=16, student_k=3)


@pytest.fixture
def cached(engine: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Of each finished request, the tokens of its prompt that were not computed again."""
    seen: dict[str, int] = {}
    own = engine._answer

    def answer(output: Any) -> Answer:
        seen[output.request_id] = output.num_cached_tokens
        return own(output)

    monkeypatch.setattr(engine, "_answer", answer)
    return seen


Publish = Callable[..., Weights]


@pytest.fixture
def publish_n(folder: Path, tmp_path: Path) -> Publish:
    """Weights n: the model's own, moved by n, or by `seed` instead."""
    own = load_file(folder / "model.safetensors")

    def make(n: int, seed: int | None = None) -> Weights:
        generator = torch.Generator().manual_seed(n if seed is None else seed)
        moved = {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in own.items()}
        return publish("r", "b", n, moved, folder, tmp_path, keep=8, fsync=False)

    return make


def requests(count: int, tag: str = "a", max_new: int = 24) -> list[Request]:
    return [Request(id=f"{tag}{i}", prompt_ids=PROMPT, seed=(0, i), max_new=max_new) for i in range(count)]


def group(prompt: np.ndarray, name: str, count: int, max_new: int = 12) -> list[Request]:
    return [Request(id=f"{name}.{i}", prompt_ids=prompt, seed=(3, i), max_new=max_new) for i in range(count)]


def finish(engine: Any) -> list[Answer]:
    answers = []
    while engine.inflight:
        answers += engine.step()
    return answers


@torch.no_grad()
def plain(folder: Path, ids: list[int]) -> np.ndarray:
    """[len(ids) - 1, V] by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).numpy()


def of_ids(logp: np.ndarray, ids: list[int]) -> np.ndarray:
    return logp[np.arange(len(ids) - 1), ids[1:]]


def assert_replays(answers: list[Answer], folders: dict[int, Path]) -> None:
    """Each log-prob is that of plain forwards, of each version for the tokens that its span names."""
    models = {n: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for n, path in folders.items()}
    for answer in answers:
        ids_G = torch.tensor(answer.completion_ids.tolist())
        logp_G = student_logits(answer, models).log_softmax(-1).gather(-1, ids_G[:, None]).squeeze(-1)
        np.testing.assert_allclose(answer.logprobs, logp_G.numpy(), atol=NEAR)


def test_after_every_swap_in_flight_the_engine_says_what_the_folder_says(engine: Any, publish_n: Publish, tmp_path: Path) -> None:
    for n in (1, 2, 3):
        engine.admit(requests(8, f"s{n}."))
        answers = engine.step() + engine.step()
        swapped = engine.swap_in(publish_n(n), tmp_path)
        assert swapped.inflight == 8 - len(answers)
        assert engine.version == n
        assert len(answers + finish(engine)) == 8
        logp = plain(tmp_path / f"weight_v{n:06d}", PROBE)
        np.testing.assert_allclose(engine.probe(PROBE), of_ids(logp, PROBE), atol=NEAR)


def test_adapters_are_merged_over_the_base_in_flight(folder: Path, engine: Any, tmp_path: Path) -> None:
    base, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    form = Form(base=folder, rank=2, alpha=4.0, target_modules=("q_proj", "down_proj"))
    for n in (51, 52):
        adapters, whole = {}, dict(base)
        for name in (name for name in base if "q_proj" in name or "down_proj" in name):
            wide, narrow = base[name].shape
            up, down = 0.2 * torch.randn(wide, 2, generator=generator), 0.2 * torch.randn(2, narrow, generator=generator)
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            adapters |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
            whole[name] = base[name] + up @ down * 2.0
        engine.admit(requests(4, f"l{n}."))
        answers = engine.step()
        swapped = engine.swap_in(publish("r", "b", n, adapters, folder, tmp_path, 8, False, form), tmp_path)
        assert swapped.inflight == 4 - len(answers)
        finish(engine)
        publish("r", "b", 60 + n, whole, folder, tmp_path, keep=8, fsync=False)
        np.testing.assert_allclose(engine.probe(PROBE), of_ids(plain(tmp_path / f"weight_v{60 + n:06d}", PROBE), PROBE), atol=NEAR)


def test_tokens_carry_the_version_that_wrote_them_and_its_log_probs(engine: Any, publish_n: Publish, tmp_path: Path) -> None:
    engine.swap_in(publish_n(11), tmp_path)
    engine.admit(requests(16))
    answers = [answer for _ in range(3) for answer in engine.step()]
    engine.swap_in(publish_n(12), tmp_path)
    answers += finish(engine)
    both = [answer for answer in answers if len(answer.spans) == 2]
    assert both
    for answer in both:
        assert [(span.start, span.version, span.kv) for span in answer.spans] == [(0, 11, "keep"), (3, 12, "keep")]
        ids = [*PROMPT.tolist(), *answer.completion_ids.tolist()]
        first = of_ids(plain(tmp_path / "weight_v000011", ids), ids)[len(PROMPT) - 1 :]
        np.testing.assert_allclose(answer.logprobs[:3], first[:3], atol=NEAR)
        assert np.abs(answer.logprobs[3:] - first[3:]).max() > NEAR, "the second version is another one"


def test_mates_of_a_group_fill_their_prompt_once(
    engine: Any, cached: dict[str, int], publish_n: Publish, tmp_path: Path
) -> None:
    engine.swap_in(publish_n(13), tmp_path)
    engine.admit([*group(LONG[0], "mates", 3), *group(LONG[1], "others", 2)])
    answers = engine.step()
    engine.admit(group(LONG[0], "late", 1))
    answers += finish(engine)
    assert cached == {
        "mates.0": 0, "mates.1": 3 * BLOCK, "mates.2": 3 * BLOCK, "others.0": 0, "others.1": 3 * BLOCK, "late.0": 3 * BLOCK,
    }
    assert_replays(answers, {13: tmp_path / "weight_v000013"})
    said = {answer.request.id: answer.completion_ids.tolist() for answer in answers}
    assert said["mates.0"] != said["mates.1"], "each mate has its own seed"
    assert said["late.0"] == said["mates.0"], "and the same one says the same, whoever filled the prompt"


@pytest.mark.parametrize("number", [15, 14])
def test_a_shared_prompt_is_filled_anew_after_a_swap_whatever_its_number(
    engine: Any, cached: dict[str, int], publish_n: Publish, tmp_path: Path, number: int
) -> None:
    engine.swap_in(publish_n(14), tmp_path)
    old, new = tmp_path / "old", tmp_path / f"weight_v{number:06d}"
    (tmp_path / "weight_v000014").rename(old)
    engine.admit(group(LONG[0], "before", 3))
    answers = engine.step() + engine.step()
    engine.swap_in(publish_n(number, seed=99), tmp_path)
    engine.admit(group(LONG[0], "after", 3))
    answers += finish(engine)
    assert {name: cached[name] for name in cached if "after" in name} == {"after.0": 0, "after.1": 3 * BLOCK, "after.2": 3 * BLOCK}
    assert_replays([answer for answer in answers if "after" in answer.request.id], {number: new})
    if number != 14:
        crossed = [answer for answer in answers if len(answer.spans) == 2]
        assert crossed
        assert_replays(crossed, {14: old, number: new})
    np.testing.assert_allclose(engine.probe(LONG[0].tolist()), of_ids(plain(new, LONG[0].tolist()), LONG[0].tolist()), atol=NEAR)


def test_what_has_not_written_when_weights_change_begins_again_under_the_new_ones(
    engine: Any, cached: dict[str, int], publish_n: Publish, tmp_path: Path
) -> None:
    engine.swap_in(publish_n(16), tmp_path)
    assert 5 * 400 < engine._engine.vllm_config.scheduler_config.max_num_batched_tokens < 6 * 400, "a step fills five prompts"
    pairs = [group(prompt, f"p{n}", 2) for n, prompt in enumerate(LONG)]
    todo = [pair[i] for i in range(2) for pair in pairs]
    engine.admit(todo)
    answers = engine.step()
    assert engine.swap_in(publish_n(17), tmp_path).inflight == 12 - len(answers)
    answers += finish(engine)
    spans = {answer.request.id: [(span.start, span.version) for span in answer.spans] for answer in answers}
    unwritten = [name for name, own in sorted(spans.items()) if own == [(0, 17)]]
    assert unwritten == ["p0.1", "p1.1", "p2.1", "p3.1", "p4.1", "p5.0", "p5.1"], "five are mates whose prompt the old weights filled"
    assert all(own in ([(0, 16)], [(0, 16), (1, 17)]) for name, own in spans.items() if name not in unwritten)
    assert [cached[name] for name in unwritten] == [0] * 6 + [3 * BLOCK]
    assert_replays(answers, {n: tmp_path / f"weight_v{n:06d}" for n in (16, 17)})
    said = {answer.request.id: answer.completion_ids.tolist() for answer in answers}
    engine.admit([request for request in todo if request.id in unwritten])
    assert {answer.request.id: answer.completion_ids.tolist() for answer in finish(engine)} == {name: said[name] for name in unwritten}


def test_top_ids_are_the_most_likely_ones(engine: Any, publish_n: Publish, tmp_path: Path) -> None:
    engine.swap_in(publish_n(21), tmp_path)
    engine.admit(requests(4))
    for answer in finish(engine):
        ids = [*PROMPT.tolist(), *answer.completion_ids.tolist()]
        logp = plain(tmp_path / "weight_v000021", ids)[len(PROMPT) - 1 :]
        assert answer.topk_ids is not None
        assert answer.topk_logprobs is not None
        np.testing.assert_array_equal(answer.topk_ids, np.argsort(-logp, 1)[:, :3])
        np.testing.assert_allclose(answer.topk_logprobs, -np.sort(-logp, 1)[:, :3], atol=5e-3)
        assert answer.finish in (Finish.STOP, Finish.LENGTH)
        assert (answer.finish is Finish.STOP) == (answer.completion_ids[-1] == STOP)


def test_an_answer_is_a_function_of_weights_prompt_and_seed(engine: Any, publish_n: Publish, tmp_path: Path) -> None:
    engine.swap_in(publish_n(31), tmp_path)
    engine.admit(requests(6))
    together = {answer.request.id: answer.completion_ids.tolist() for answer in finish(engine)}
    assert len(set(map(tuple, together.values()))) > 1
    for request in requests(6):
        engine.admit([request])
        assert finish(engine)[0].completion_ids.tolist() == together[request.id]


def test_what_is_aborted_is_gone_and_what_cannot_be_served_is_told(engine: Any) -> None:
    engine.admit(requests(5))
    engine.step()
    assert engine.inflight_tokens == 5 * (4 + 24)
    assert sorted(request.id for request in engine.abort()) == [f"a{i}" for i in range(5)]
    assert engine.inflight == 0
    engine.admit(requests(1, "long", max_new=509))
    assert engine.inflight_tokens == 0
    (answer,) = finish(engine)
    assert answer.finish is Finish.ERROR
    assert "4 + 509 tokens are more than the model's 512" in answer.error


def test_the_drill_passes(engine: Any, folder: Path, tmp_path: Path) -> None:
    found = drill(engine, folder, tmp_path, "r", "float32")
    assert found.moved > 0.1
    assert found.error < NEAR


def test_weights_that_were_tampered_with_are_not_taken(engine: Any, publish_n: Publish, tmp_path: Path) -> None:
    weights = publish_n(41)
    file = tmp_path / weights.folder / "model.safetensors"
    body = bytearray(file.read_bytes())
    body[-3] ^= 1
    file.write_bytes(bytes(body))
    with pytest.raises(SwapRefused, match="the manifest says"):
        engine.swap_in(weights, tmp_path)


def test_a_tied_head_that_is_not_repaired_is_refused_with_both_numbers(
    engine: Any, folder: Path, publish_n: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamopd.generate import vllm

    monkeypatch.setattr(vllm.WeightTaker, "repairs_head", False)
    if "untied" in folder.name:
        engine.swap_in(publish_n(51), tmp_path)
        return
    with pytest.raises(TornWeights, match=r"lm_head is 0\.\d+ away from the weights of the folder, 0\.0001 is allowed"):
        engine.swap_in(publish_n(51), tmp_path)
    monkeypatch.setattr(vllm, "_not_served", lambda model, fresh: iter(()))
    both = r"gives probe token \d+ a log-prob of -\d+\.\d+; a plain forward of the same folder gives -\d+\.\d+"
    with pytest.raises(SwapRefused, match=both):
        drill(engine, folder, tmp_path, "r", "float32")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [({"kv": "recompute"}, "vLLM keeps keys and values"), ({"student_k": 4, "temperature": 0.7}, "at temperature 1; vLLM tells them at"),
     ({"sleeps": True}, "vLLM cannot on this cpu")],
)
def test_what_vllm_cannot_do_is_refused_before_it_is_opened(folder: Path, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        open_engine("vllm", folder=folder, stop_ids=(STOP,), loader=Loader(folder), max_inflight=4, **values)


def test_a_system_without_what_the_kernels_want_is_told_what_to_install() -> None:
    from streamopd.generate.vllm import require_kernels

    with pytest.raises(ConfigError, match=r"libnuma\.so\.1.*apt install libnuma1"):
        require_kernels(SimpleNamespace())
