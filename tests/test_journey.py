"""One prompt through the whole journey, in memory, room by room."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from streamopd import config as configs
from streamopd import methods
from streamopd.assets import resolve
from streamopd.generate.engine import Request
from streamopd.generate.open import open_engine
from streamopd.grade.graders import load as load_grader
from streamopd.learn.schedule import Schedule
from streamopd.learn.trainer import AdamW, Trainer
from streamopd.pack.close import to_batch
from streamopd.prompts.open import open_questions
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Batch, Fate, Group, Prompt, Scored, decode, encode
from streamopd.score.local import load_teachers
from streamopd.stream import HandOff, Limits
from streamopd.stream.memory import MemoryBroker, MemoryStore
from streamopd.sync.publish import publish
from streamopd.sync.swap import Loader
from streamopd.topology import Stage


async def _next(broker: MemoryBroker, stage: Stage):  # type: ignore[no-untyped-def]
    (entry,) = await broker.read(stage, "test", 1)
    return entry


@pytest.mark.anyio
async def test_one_prompt_becomes_new_weights(tmp_path: Path) -> None:
    config, _ = configs.load("quickstart")
    method, student = methods.load("default"), resolve("asset:quickstart-student")
    tokenizer, head = Tokenizer.open(student), {"run": "r", "method": method.digest, "born_s": time.time()}
    trainer = Trainer(
        student, method, schedule=Schedule(lr=1e-3, max_steps=1, warmup_steps=0, hold_fraction=1.0, min_lr_ratio=0.0),
        adam=AdamW(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1.0), adapter=None, dtype="float32",
        stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id, max_age=0, micro_batch_tokens=512, head_chunk=64, seed=0,
    )
    broker = MemoryBroker(Limits(groups_per_step=1, max_staleness=0), MemoryStore())
    await broker.lead("life", 1, False)
    manifest = publish("r", "life", 0, trainer.tensors(), student, tmp_path, keep=4, fsync=False)
    assert await broker.rebuild("life", 1, 0, {}, manifest) == "done"

    # a question
    dataset, renderer = open_questions(config.data, 0, 1, student, {}, "r", method.digest)
    prompt = renderer.prompt(0, dataset.question(0))
    assert await broker.issue("life", [(0, encode(prompt))]) == ["done"]
    entry = await _next(broker, Stage.ISSUED)
    prompt = decode(Prompt, entry.body)

    # an answer under version 0, graded
    engine = open_engine("hf", folder=student, stop_ids=tokenizer.stop_ids, loader=Loader(), max_inflight=2, student_k=method.student_k)
    engine.swap_in(await broker.weights(), tmp_path)
    engine.admit([Request(id=f"{prompt.id}.0", prompt_ids=prompt.prompt_ids.numpy(), seed=(0, 0, 0), max_new=33)])
    answers = []
    while engine.inflight:
        answers += engine.step()
    outcome = load_grader("chain-sum")(prompt, tokenizer.decode(answers[0].completion_ids.tolist()), True)
    group = Group(id=prompt.id, prompt=prompt, rollouts=[answers[0].rollout(outcome)], **head)
    assert [(span.start, span.version) for span in group.rollouts[0].weight_spans] == [(0, 0)]
    assert await broker.hand([HandOff(entry, encode(group))]) == ["done"]

    # what the teacher thinks of the very tokens
    entry = await _next(broker, Stage.GENERATED)
    teacher = load_teachers({"default": (resolve("asset:quickstart-teacher"), "float32")}, tokenizer.stop_ids, 512)["default"]
    (views,) = teacher.score([decode(Group, entry.body)], method.evidence)
    assert len(views[0][0].logprobs) == len(answers[0].completion_ids)
    assert await broker.hand([HandOff(entry, encode(Scored(id=group.id, group=group, views=views, **head)))]) == ["done"]

    # a batch, a step, new weights and a fate together
    entry = await _next(broker, Stage.SCORED)
    batch = to_batch(0, "r", method.digest, time.time(), [decode(Scored, entry.body)])
    assert (await broker.close([entry], 0, encode(batch)))[0] == "done"
    held = await broker.batch(0, "learner")
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    trained = trainer.train(decode(Batch, held.body))
    assert trained.fates == [Fate.TRAINED]
    manifest = publish("r", "life", 1, trainer.tensors(), student, tmp_path, keep=4, fsync=False)
    assert await broker.step("life", 1, 1, manifest, [(0, held.members[0][1], Fate.TRAINED)]) == "done"
    assert any(not np.array_equal(before[name], tensor) for name, tensor in trainer.tensors().items())

    # and the generator serves them
    engine.swap_in(await broker.weights(), tmp_path)
    assert engine.version == 1
    counters = await broker.counters()
    assert (counters.issued, counters.fated, counters.steps, sum(counters.inflight.values())) == (1, 1, 1, 0)
