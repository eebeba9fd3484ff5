"""A step: the same whatever the layout, the same bits after a restart, and nothing moves that should not."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from streamopd.errors import GarbageRecord, StreamopdError, UserError
from streamopd.learn.final import marked_step
from streamopd.learn.student import Adapter
from streamopd.learn.trainer import Trainer
from streamopd.schemas import Array, Batch, Fate, Finish, Scored, Span, TopK
from streamopd.score.local import LocalTeacher
from streamopd.slots import AgeDecay, Branch, ForwardKL, FullVocabulary, Method, ReverseKL, Union

FULL = Method(name="full", summary="", branches=(Branch(support=FullVocabulary(), loss=ForwardKL()),))
UNION = Method(name="union", summary="", branches=(Branch(support=Union(student_k=0, teacher_k=3), loss=ReverseKL()),))
DECAY = Method(
    name="decay", summary="", branches=(Branch(support=Union(student_k=0, teacher_k=3)),), age_weight=AgeDecay(half_life_steps=1.0)
)
LORA = Adapter(rank=4, alpha=8.0, target_modules=("q_proj", "down_proj"))
TrainerOpener = Callable[..., Trainer]
BatchMaker = Callable[..., Batch]


def gradients(trainer: Trainer, batch: Batch) -> dict[str, Tensor]:
    """Those of a step that moves nothing."""
    trainer.train(batch)
    return {name: p.grad.clone() for name, p in trainer.parameters.items()}


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.tensors().items()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def replace_view(item: Scored, **values: object) -> Scored:
    return msgspec.structs.replace(item, views=[[msgspec.structs.replace(item.views[0][0], **values)]])


# ---------------------------------------------------------------- the gradient
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(7)), st.integers(1, 200), st.integers(1, 40), st.sampled_from([FULL, UNION, DECAY]))
def test_the_gradient_does_not_depend_on_order_split_or_chunks(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker, order: list[int], budget: int, chunk: int, method: Method
) -> None:
    trainer = open_trainer(tied, method, lr=0.0, max_grad_norm=0.0, micro_batch_tokens=10_000)
    batch = make_batch(3, range(7), method, length=None, spans=[Span(0, 1)])
    fresher = make_batch(3, range(4), method).items + batch.items[4:]  # two ages
    whole = gradients(trainer, msgspec.structs.replace(batch, items=fresher))
    trainer.micro_batch_tokens, trainer.head_chunk = budget, chunk
    shuffled = gradients(trainer, msgspec.structs.replace(batch, items=[fresher[i] for i in order]))
    for name, gradient in whole.items():
        torch.testing.assert_close(shuffled[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_a_plain_forward_kl_over_each_answer_alone(
    untied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    batch = make_batch(0, range(5), FULL, vocab=300)
    found = gradients(open_trainer(untied, FULL, lr=0.0, max_grad_norm=0.0), batch)
    model = AutoModelForCausalLM.from_pretrained(untied)
    total = sum(len(item.group.rollouts[0].completion_ids) for item in batch.items)
    for item in batch.items:
        rollout = item.group.rollouts[0]
        ids = np.concatenate([rollout.prompt_ids.numpy(), rollout.completion_ids.numpy()]).astype(np.int64)
        p = model(torch.from_numpy(ids)[None]).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        q = torch.from_numpy(item.views[0][0].support.logprobs.numpy().copy())
        ((q.exp() * (q - p)).sum() / total).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [FULL, UNION], ids=["full", "union"])
def test_evidence_shifted_by_one_token_is_seen_as_another_teacher(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker, method: Method
) -> None:
    batch = make_batch(0, range(6), method, length=9)
    teacher = LocalTeacher(tied, "default", "float32", (2,), 512)  # the student's own weights
    views = teacher.score([item.group for item in batch.items], method.evidence)
    scored = [msgspec.structs.replace(item, views=seen) for item, seen in zip(batch.items, views, strict=True)]
    true = msgspec.structs.replace(batch, items=scored)
    shifted = msgspec.structs.replace(true, items=[shift_by_one(item) for item in true.items])
    trainer = open_trainer(tied, method, lr=0.0)
    assert trainer.train(true).metrics["loss"] == pytest.approx(0, abs=1e-4)
    assert trainer.train(true).metrics["overlap_ratio"] == 1.0
    assert trainer.train(shifted).metrics["loss"] > 0.1


def shift_by_one(item: Scored) -> Scored:
    view = item.views[0][0]

    def rolled(array: Array | None) -> Array | None:
        return None if array is None else Array.of(np.roll(array.numpy(), 1, 0), array.dtype)

    support = TopK(rolled(view.support.ids), rolled(view.support.logprobs))
    return replace_view(item, support=support, mass=rolled(view.mass), stop_logmass=rolled(view.stop_logmass))


def test_steps_bring_the_student_closer_to_its_teacher(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    trainer = open_trainer(tied, FULL)
    losses = [trainer.train(make_batch(n, range(8))).metrics["loss"] for n in range(8)]
    assert losses[-1] < 0.7 * losses[0]


# ---------------------------------------------------------------- what is not trained
def test_a_batch_whose_tokens_all_expired_moves_nothing(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    trainer = open_trainer(tied, max_age=4)
    before = snapshot(trainer)
    done = trainer.train(make_batch(9, range(3), spans=[Span(0, 4)]))
    assert done.fates == [Fate.EXPIRED] * 3
    assert same_bits(before, snapshot(trainer))
    assert done.tokens_trained == 0
    assert "loss" not in done.metrics
    assert sum(done.dropped_lengths.values()) == 3


def test_old_tokens_are_masked_while_their_answer_stays(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    done = open_trainer(tied, max_age=4).train(make_batch(9, range(2), length=8, spans=[Span(0, 4), Span(4, 8)]))
    assert done.fates == [Fate.TRAINED] * 2
    assert done.age_steps == {"1": 8}
    assert done.tokens_trained == 8
    assert done.metrics["age_max"] == 1
    assert done.trained_lengths == {"8": 2}
    assert done.dropped_lengths == {}


def test_an_answer_that_keeps_fewer_than_half_its_tokens_goes_whole(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    done = open_trainer(tied, max_age=4).train(make_batch(9, range(2), length=8, spans=[Span(0, 4), Span(5, 8)]))
    assert done.fates == [Fate.EXPIRED] * 2
    assert done.dropped_lengths == {"8": 2}


@pytest.mark.parametrize("finish", [Finish.ERROR, Finish.ABORTED])
def test_failed_and_aborted_answers_teach_nothing(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker, finish: Finish
) -> None:
    good, bad = make_batch(0, range(3)), make_batch(0, range(3, 5), finish=finish)
    trainer = open_trainer(tied, lr=0.0, max_grad_norm=0.0)
    alone = gradients(trainer, good)
    mixed = msgspec.structs.replace(good, items=good.items + bad.items)
    assert same_bits(alone, gradients(trainer, mixed))
    assert trainer.train(mixed).fates == [Fate.TRAINED] * 3 + [Fate.EXPIRED] * 2


def test_a_group_counts_as_trained_when_one_of_its_answers_is(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    item = make_batch(0, range(1), group_size=3).items[0]
    old = msgspec.structs.replace(item.group.rollouts[0], weight_spans=[Span(0, 0)])
    fresh = [msgspec.structs.replace(r, weight_spans=[Span(0, 9)]) for r in item.group.rollouts[1:]]
    group = msgspec.structs.replace(item.group, rollouts=[old, *fresh])
    batch = msgspec.structs.replace(make_batch(9, range(0)), items=[msgspec.structs.replace(item, group=group)])
    done = open_trainer(tied).train(batch)
    assert done.fates == [Fate.TRAINED]
    assert sum(done.trained_lengths.values()) == 2
    assert sum(done.dropped_lengths.values()) == 1


def test_tokens_of_the_future_stop_the_step(tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker) -> None:
    with pytest.raises(GarbageRecord, match="before those weights exist"):
        open_trainer(tied).train(make_batch(2, range(2), spans=[Span(0, 3)]))


def test_a_loss_that_is_no_number_names_batch_and_answer_and_steps_nothing(
    untied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    trainer, batch = open_trainer(untied), make_batch(5, range(4), vocab=300)
    with torch.no_grad():
        trainer.student.model.model.embed_tokens.weight[1] = torch.inf  # id 1 is nowhere but in the prompt below
    rollout = msgspec.structs.replace(batch.items[2].group.rollouts[0], prompt_ids=Array.of([1, 4], "int32"))
    group = msgspec.structs.replace(batch.items[2].group, rollouts=[rollout])
    items = [*batch.items[:2], msgspec.structs.replace(batch.items[2], group=group), batch.items[3]]
    before = snapshot(trainer)
    with pytest.raises(StreamopdError, match=r"The loss of batch 5 .* rollout p2\.0 \(seq 2\)"):
        trainer.train(msgspec.structs.replace(batch, items=items))
    assert same_bits(before, snapshot(trainer))


def test_an_id_beyond_the_students_vocabulary_is_refused_with_both_numbers(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    with pytest.raises(GarbageRecord, match=r"Id \d+ came .* the student knows 19"):
        open_trainer(tied, UNION).train(make_batch(0, method=UNION, vocab=300))


def test_a_teacher_of_another_vocabulary_is_refused_for_whole_distributions(
    untied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    with pytest.raises(UserError, match="speaks of 19 ids, the student of 300"):
        open_trainer(untied).train(make_batch(0, vocab=19))


def test_a_gradient_without_a_norm_steps_nothing(
    untied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    trainer = open_trainer(untied)
    with torch.no_grad():  # the loss stays a number, its slope in the last hidden state does not
        trainer.student.model.model.norm.weight.mul_(1e-30)
        trainer.student.model.lm_head.weight.mul_(1e30)
    before = snapshot(trainer)
    with pytest.raises(StreamopdError, match=r"The gradient of batch 5 .* rollout p0\.0 \(seq 0\)"):
        trainer.train(make_batch(5, vocab=300))
    assert same_bits(before, snapshot(trainer))


def test_age_weights_shift_attention_without_changing_the_steps_size(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    weighted = open_trainer(tied, DECAY, lr=0.0, max_grad_norm=0.0)
    plain = open_trainer(tied, UNION, lr=0.0, max_grad_norm=0.0)
    of_one_age = make_batch(4, range(4), UNION, spans=[Span(0, 1)])
    assert same_bits(gradients(weighted, of_one_age), gradients(plain, of_one_age))
    of_two_ages = make_batch(4, range(4), UNION, length=6, spans=[Span(0, 1), Span(3, 4)])
    assert not same_bits(gradients(weighted, of_two_ages), gradients(plain, of_two_ages))


def test_a_long_gradient_is_cut_to_its_norm_and_said_to_be(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    trainer = open_trainer(tied, lr=0.0, max_grad_norm=0.01)
    done = trainer.train(make_batch())
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trainer.parameters.values()]))
    assert float(norm) == pytest.approx(0.01, rel=1e-3)
    assert done.metrics["clip_fraction"] == 1
    assert done.metrics["grad_norm"] > 0.01


# ---------------------------------------------------------------- state
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_trainer_restored_from_disk_goes_on_bit_for_bit(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker, tmp_path: Path, adapter: Adapter | None
) -> None:
    first = open_trainer(tied, adapter=adapter)
    for n in range(3):
        first.train(make_batch(n, range(n, n + 6)))
    first.save(tmp_path)
    assert (tmp_path / "trainer.safetensors").stat().st_size <= first.nbytes
    second = open_trainer(tied, adapter=adapter, seed=99)
    second.load(tmp_path)
    for n in range(3, 6):
        batch = make_batch(n, range(n, n + 6))
        assert first.train(batch).metrics == second.train(batch).metrics
    assert same_bits(snapshot(first), snapshot(second))


def test_the_state_of_another_student_is_refused_by_name(
    tied: Path, untied: Path, open_trainer: TrainerOpener, tmp_path: Path
) -> None:
    open_trainer(tied).save(tmp_path)
    with pytest.raises(UserError, match=r"lm_head.weight is None there and \(300, 64\) here"):
        open_trainer(untied).load(tmp_path)


# ---------------------------------------------------------------- what is published
@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_the_saved_folder_answers_in_plain_transformers_as_the_trainer_does(
    request: pytest.FixtureRequest, open_trainer: TrainerOpener, make_batch: BatchMaker, tmp_path: Path, model: str,
    adapter: Adapter | None,
) -> None:
    folder = request.getfixturevalue(model)
    vocab = 19 if model == "tied" else 300
    trainer = open_trainer(folder, adapter=adapter)
    for n in range(3):
        trainer.train(make_batch(n, vocab=vocab))
    trainer.save_hf(tmp_path / "final", 3, "r")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trainer.student.model(ids).logits, rtol=1e-5, atol=1e-5)
    names = trainer.tensors().keys()
    assert names == {name for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
    assert ("lm_head.weight" in names) == (model == "untied")
    assert (tmp_path / "final" / "tokenizer.json").read_text() == "{}"
    assert marked_step(tmp_path / "final", "r") == 3


def test_while_a_student_is_saved_the_one_before_it_stays_whole(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, trainer = tmp_path / "final", open_trainer(tied)
    trainer.save_hf(final, 1, "r")
    before = {file.name: file.read_bytes() for file in final.iterdir()}
    (tmp_path / ".final-half").mkdir()  # of a learner that was killed
    trainer.train(make_batch())

    def look_while_saving(tensors: dict[str, Tensor], file: Path, **more: Any) -> None:
        assert {file.name: file.read_bytes() for file in final.iterdir()} == before
        save_file(tensors, file, **more)
        assert {file.name: file.read_bytes() for file in final.iterdir()} == before

    monkeypatch.setattr("streamopd.learn.student.save_file", look_while_saving)
    trainer.save_hf(final, 2, "r")
    assert marked_step(final, "r") == 2
    assert (final / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert {file.name for file in final.iterdir()} == set(before)
    assert [file.name for file in tmp_path.iterdir()] == ["final"]


def test_a_student_that_cannot_be_saved_leaves_the_one_before_it(
    tied: Path, open_trainer: TrainerOpener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = open_trainer(tied)
    trainer.save_hf(tmp_path / "final", 1, "r")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("streamopd.learn.student.save_file", full)
    with pytest.raises(UserError, match=r"No space left on device\): it needs [\d,]+ bytes, [\d,]+ are free"):
        trainer.save_hf(tmp_path / "final", 2, "r")
    assert marked_step(tmp_path / "final", "r") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["final"]


def test_adapters_learn_while_the_models_own_weights_stay(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    trainer = open_trainer(tied, adapter=LORA)
    before = snapshot(trainer)
    trainer.train(make_batch(0))
    trainer.train(make_batch(1))
    moved = {name for name, tensor in snapshot(trainer).items() if not torch.equal(tensor, before[name])}
    assert moved == {f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")}
    assert all("lora_" in name for name in trainer.parameters)


def test_adapters_for_layers_the_model_lacks_are_refused(tied: Path, open_trainer: TrainerOpener) -> None:
    with pytest.raises(UserError, match=r"learn.lora.target_modules = \['qq_proj'\]"):
        open_trainer(tied, adapter=Adapter(rank=4, alpha=8.0, target_modules=("qq_proj",)))


def test_a_bfloat16_student_publishes_bfloat16_and_keeps_finer_masters(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    trainer = open_trainer(tied, dtype="bfloat16", lr=1e-5)
    trainer.train(make_batch())
    assert {t.dtype for t in trainer.tensors().values()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.parameters.values()} == {torch.float32}


def test_a_folder_without_a_model_is_refused_by_name(open_trainer: TrainerOpener, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        open_trainer(tmp_path)
