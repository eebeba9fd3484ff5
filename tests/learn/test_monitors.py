"""The figures of a step, on cases whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from streamopd.learn.monitors import describe_answers
from streamopd.learn.trainer import Trainer
from streamopd.schemas import Array, Batch, Evidence, Finish, Rollout, Span
from streamopd.slots import Branch, Method, Union

TrainerOpener = Callable[..., Trainer]
BatchMaker = Callable[..., Batch]


def with_logprobs(batch: Batch, change: Callable[[Rollout], Rollout]) -> Batch:
    items = [
        msgspec.structs.replace(i, group=msgspec.structs.replace(i.group, rollouts=[change(r) for r in i.group.rollouts]))
        for i in batch.items
    ]
    return msgspec.structs.replace(batch, items=items)


def test_every_figure_has_its_fixed_name(tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker) -> None:
    metrics = open_trainer(tied).train(make_batch(2, correct=True, spans=[Span(0, 1)])).metrics
    assert metrics.keys() == {
        "loss", "kl", "overlap_ratio", "student_mass", "teacher_mass", "entropy", "entropy_gap", "mismatch_kl/age_1", "ess",
        "stop_gap", "truncated_ratio", "repeat_ratio", "clip_fraction", "grad_norm", "lr", "age_mean", "age_max", "age_p95",
        "tokens", "accuracy", "completion_length",
    }
    assert all(np.isfinite(value) for value in metrics.values())


def test_a_bound_is_never_called_a_divergence(tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker) -> None:
    union = Method(name="u", summary="", branches=(Branch(support=Union(student_k=0, teacher_k=3)),))
    metrics = open_trainer(tied, union).train(make_batch(method=union)).metrics
    assert "kl" not in metrics
    assert metrics["kl_bound"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert 0 < metrics["student_mass"] < 1
    assert 0 < metrics["teacher_mass"] < 1


def test_mismatch_is_zero_where_the_generator_sampled_from_the_same_weights(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    trainer = open_trainer(tied, lr=0.0)
    batch = make_batch(0)
    mu = {item.group.rollouts[0].id: own_logprobs(trainer, item.group.rollouts[0]) for item in batch.items}
    agreeing = with_logprobs(batch, lambda r: msgspec.structs.replace(r, logprobs=Array.of(mu[r.id], "float32")))
    assert trainer.train(agreeing).metrics["mismatch_kl"] == pytest.approx(0, abs=1e-6)
    assert trainer.train(agreeing).metrics["ess"] == pytest.approx(1, abs=1e-4)
    off = with_logprobs(batch, lambda r: msgspec.structs.replace(r, logprobs=Array.of(mu[r.id] - np.log(2), "float32")))
    assert trainer.train(off).metrics["mismatch_kl"] == pytest.approx(2 - 1 - np.log(2), abs=1e-4)


def own_logprobs(trainer: Trainer, rollout: Rollout, temperature: float = 1.0) -> np.ndarray:
    """log-probs of the kernel softmax(logits / temperature) through the model's plain forward."""
    import torch

    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids.numpy(), rollout.completion_ids.numpy()]).astype(np.int64))
    with torch.no_grad():
        logits = trainer.student.model(ids[None]).logits[0, len(rollout.prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[len(rollout.prompt_ids) :, None])[:, 0].numpy()


def test_mismatch_is_taken_through_the_temperature_that_sampled(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    trainer, batch = open_trainer(tied, lr=0.0), make_batch(0)
    warm = with_logprobs(batch, lambda r: msgspec.structs.replace(
        r, temperature=0.7, logprobs=Array.of(own_logprobs(trainer, r, 0.7), "float32")
    ))
    assert trainer.train(warm).metrics["mismatch_kl"] == pytest.approx(0, abs=1e-5)


def test_mismatch_of_a_nucleus_is_absent_rather_than_wrong(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    cut = with_logprobs(make_batch(0), lambda r: msgspec.structs.replace(r, top_p=0.9))
    metrics = open_trainer(tied).train(cut).metrics
    assert "mismatch_kl" not in metrics
    assert "ess" not in metrics


def test_a_teacher_that_never_stops_shows_in_the_stop_gap(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    batch = make_batch(0)

    def silent(view: Evidence) -> Evidence:
        return msgspec.structs.replace(view, stop_logmass=Array.of(np.full(len(view.logprobs), -25.0), "float32"))

    items = [msgspec.structs.replace(item, views=[[silent(item.views[0][0])]]) for item in batch.items]
    never = msgspec.structs.replace(batch, items=items)
    assert open_trainer(tied).train(never).metrics["stop_gap"] < -15
    assert "stop_gap" not in open_trainer(tied).train(make_batch(0, finish=Finish.LENGTH)).metrics


def test_answers_are_counted_by_how_they_ended_and_what_they_are(make_batch: BatchMaker) -> None:
    ended = make_batch(0, range(3), length=9, correct=True)
    cut = make_batch(0, range(3, 4), length=9, finish=Finish.LENGTH, correct=False)
    failed = make_batch(0, range(4, 6), finish=Finish.ERROR)
    figures = describe_answers(msgspec.structs.replace(ended, items=ended.items + cut.items + failed.items))
    assert figures == {"completion_length": 9, "truncated_ratio": 0.25, "repeat_ratio": 0, "accuracy": 0.75}


@pytest.mark.parametrize(("ids", "repeats"), [
    ([9, 4, 5, 4, 5, 4, 5, 4, 5], True), ([7] * 8, True), ([3, 4, 5, 6] * 2, True), ([3, 4, 5, 6, 7] * 2, False),
    ([7] * 7, False), ([3, 4, 5, 4, 5, 4, 5, 6], False),
])
def test_an_answer_repeats_when_its_end_is_one_short_pattern(
    make_batch: BatchMaker, ids: list[int], repeats: bool
) -> None:
    (item,) = make_batch(0, range(1)).items
    rollout = msgspec.structs.replace(
        item.group.rollouts[0], completion_ids=Array.of(ids, "int32"), logprobs=Array.of(np.zeros(len(ids)), "float32")
    )
    looped = msgspec.structs.replace(item, group=msgspec.structs.replace(item.group, rollouts=[rollout]), views=[[]])
    assert describe_answers(msgspec.structs.replace(make_batch(0, range(0)), items=[looped]))["repeat_ratio"] == repeats
