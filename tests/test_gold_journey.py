"""Answers of the data through the whole journey, in memory: who wrote what, what is recorded of it, and every group's fate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from streamopd import config as configs
from streamopd import methods
from streamopd.assets import resolve
from streamopd.generate.commission import commission
from streamopd.generate.engine import Answer
from streamopd.generate.open import open_engine
from streamopd.learn.rows import sort_out
from streamopd.learn.schedule import Schedule
from streamopd.learn.trainer import AdamW, Trainer
from streamopd.pack.close import to_batch
from streamopd.pack.filters import refusals
from streamopd.pack.sift import sift
from streamopd.prompts.open import open_questions
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Batch, Fate, Group, Prompt, Rollout, Scored, decode, encode
from streamopd.score.local import load_teachers
from streamopd.slots import Method
from streamopd.stream import HandOff, Limits
from streamopd.stream.memory import MemoryBroker, MemoryStore
from streamopd.sync.publish import publish
from streamopd.sync.swap import Loader
from streamopd.topology import Stage

STUDENT, TEACHER = resolve("asset:quickstart-student"), resolve("asset:quickstart-teacher")
TOKENIZER = Tokenizer.open(STUDENT)
GROUPS, ANSWERS, LONGEST = 8, 2, 33


def open_trainer(method: Method) -> Trainer:
    return Trainer(
        STUDENT, method, schedule=Schedule(lr=1e-3, max_steps=1, warmup_steps=0, hold_fraction=1.0, min_lr_ratio=0.0),
        adam=AdamW(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1.0), adapter=None, dtype="float32",
        stop_ids=TOKENIZER.stop_ids, pad_id=TOKENIZER.pad_id, max_age=0, micro_batch_tokens=512, head_chunk=64, seed=0,
    )


def write(prompts: list[Prompt], method: Method, manifest: object, folder: Path) -> dict[str, list[Answer]]:
    """The answers to each prompt, under the weights of `manifest`."""
    engine = open_engine(
        "hf", folder=STUDENT, stop_ids=TOKENIZER.stop_ids, loader=Loader(), max_inflight=GROUPS * ANSWERS, student_k=method.student_k
    )
    engine.swap_in(manifest, folder)  # type: ignore[arg-type]
    for prompt in prompts:
        engine.admit(commission(prompt, method.at(0.0).behaviour, count=ANSWERS, run_seed=0, max_new=LONGEST))
    found: dict[str, list[Answer]] = {prompt.id: [] for prompt in prompts}
    while engine.inflight:
        for answer in engine.step():
            found[answer.request.id.rpartition(".")[0]].append(answer)
    return found


def author(rollout: Rollout) -> str:
    (who,) = {span.who for span in rollout.authors} or {"student"}
    return who


@torch.inference_mode()
def students_logp(rollout: Rollout) -> Iterator[float]:
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    prompt, ids = rollout.prompt_ids.numpy().tolist(), rollout.completion_ids.numpy().tolist()
    logp = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    yield from logp.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


@pytest.mark.anyio
async def test_a_gold_coin_decides_who_writes_and_every_answer_is_trained(tmp_path: Path) -> None:
    config, _ = configs.load("quickstart")
    method = methods.load("gkd_gold")
    head = {"run": "r", "method": method.digest, "born_s": time.time()}
    trainer = open_trainer(method)
    broker = MemoryBroker(Limits(groups_per_step=GROUPS, max_staleness=0), MemoryStore())
    await broker.lead("life", 1, False)
    manifest = publish("r", "life", 0, trainer.tensors(), STUDENT, tmp_path, keep=4, fsync=False)
    assert await broker.rebuild("life", 1, 0, {}, manifest) == "done"

    # questions with answers of their own
    dataset, renderer = open_questions(config.data, 0, 1, STUDENT, {}, "r", method.digest, LONGEST)
    questions = [dataset.question(seq) for seq in range(GROUPS)]
    issued = [(seq, encode(renderer.prompt(seq, question))) for seq, question in enumerate(questions)]
    assert await broker.issue("life", issued) == ["done"] * GROUPS
    entries = await broker.read(Stage.ISSUED, "test", GROUPS)
    prompts = [decode(Prompt, entry.body) for entry in entries]

    # the coin falls, the same way in two engines
    served = await broker.weights()
    written, again = (write(prompts, method, served, tmp_path) for _ in range(2))
    groups = [Group(id=p.id, prompt=p, rollouts=[answer.rollout() for answer in written[p.id]], **head) for p in prompts]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert {r.id: author(r) for r in rollouts} == {a.request.id: author(a.rollout()) for some in again.values() for a in some}
    gold = [r for r in rollouts if author(r) == "gold"]
    assert 0 < len(gold) < len(rollouts)
    for rollout in gold:
        seq = int(rollout.id.partition(".")[0].removeprefix("p"))
        assert TOKENIZER.decode(rollout.completion_ids.numpy().tolist()) == questions[seq].completion
        assert rollout.completion_ids.numpy()[-1] in TOKENIZER.stop_ids
        np.testing.assert_allclose(rollout.logprobs.numpy(), list(students_logp(rollout)), atol=2e-4)
    answers = [HandOff(entry, encode(group)) for entry, group in zip(entries, groups, strict=True)]
    assert await broker.hand(answers) == ["done"] * GROUPS

    # the teacher scores all alike, and nothing is filtered
    entries = await broker.read(Stage.GENERATED, "test", GROUPS)
    groups = [decode(Group, entry.body) for entry in entries]
    teacher = load_teachers({"default": (TEACHER, "float32")}, TOKENIZER.stop_ids, 512)["default"]
    scored = [Scored(id=g.id, group=g, views=v, **head) for g, v in zip(groups, teacher.score(groups, method.evidence), strict=True)]
    for item in scored:
        sifted = sift(item, refusals(item, 1, True, True, method.needs_teacher), method.select)
        assert (sifted.reason, len(sifted.scored.group.rollouts)) == (None, ANSWERS)
    assert await broker.hand([HandOff(e, encode(item)) for e, item in zip(entries, scored, strict=True)]) == ["done"] * GROUPS

    # the learner is told who wrote what, and every group has its fate
    entries = await broker.read(Stage.SCORED, "test", GROUPS)
    batch = to_batch(0, "r", method.digest, time.time(), [decode(Scored, entry.body) for entry in entries])
    told = [row for row in sort_out(batch, 0).rows if (row.authors == 2).all()]
    assert sorted(row.rollout.id for row in told) == sorted(rollout.id for rollout in gold)
    assert (await broker.close(entries, 0, encode(batch)))[0] == "done"
    held = await broker.batch(0, "learner")
    trained = trainer.train(decode(Batch, held.body))
    assert trained.fates == [Fate.TRAINED] * GROUPS
    manifest = publish("r", "life", 1, trainer.tensors(), STUDENT, tmp_path, keep=4, fsync=False)
    fates = [(seq, attempt, Fate.TRAINED) for seq, attempt in held.members]
    assert await broker.step("life", 1, 1, manifest, fates) == "done"
    counters = await broker.counters()
    assert (counters.issued, counters.fated, sum(counters.inflight.values())) == (GROUPS, GROUPS, 0)


def test_the_loss_of_sft_gold_is_the_students_surprise_at_the_answers_and_no_teacher_is_asked(tmp_path: Path) -> None:
    config, _ = configs.load("quickstart")
    method = methods.load("sft_gold")
    trainer = open_trainer(method)
    manifest = publish("r", "life", 0, trainer.tensors(), STUDENT, tmp_path, keep=4, fsync=False)
    dataset, renderer = open_questions(config.data, 0, 1, STUDENT, {}, "r", method.digest, LONGEST)
    prompts = [renderer.prompt(seq, dataset.question(seq)) for seq in range(GROUPS)]
    written = write(prompts, method, manifest, tmp_path)
    assert {author(answer.rollout()) for some in written.values() for answer in some} == {"gold"}
    head = {"run": "r", "method": method.digest, "born_s": 0.0}
    items = [
        Scored(id=p.id, group=Group(id=p.id, prompt=p, rollouts=[a.rollout() for a in written[p.id]], **head),
               views=[[] for _ in written[p.id]], **head)
        for p in prompts
    ]
    assert not any(reason for item in items for reason in refusals(item, 1, True, True, method.needs_teacher))
    expected = -np.concatenate([a.logprobs for some in written.values() for a in some]).mean()
    assert trainer.train(Batch(id="b0", n=0, items=items, **head)).metrics["loss"] == pytest.approx(expected, abs=1e-4)
