"""The real learner's arithmetic through a kill: what it replays from a checkpoint comes out the same, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamopd import config as configs
from streamopd import methods
from streamopd.assets import resolve
from streamopd.config import Config
from streamopd.generate.engine import Engine, Request
from streamopd.generate.open import open_engine
from streamopd.learn.lineage import Lineage
from streamopd.learn.schedule import Schedule
from streamopd.learn.student import Adapter
from streamopd.learn.trainer import AdamW, Trainer
from streamopd.pack.close import to_batch
from streamopd.prompts.open import open_questions
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Batch, Group, Prompt, Scored, Weights, decode, encode
from streamopd.score.local import load_teachers
from streamopd.slots import Method
from streamopd.stream import HandOff, Limits
from streamopd.stream.memory import MemoryBroker, MemoryStore
from streamopd.sync.publish import publish
from streamopd.sync.swap import Loader
from streamopd.topology import Stage

pytestmark = pytest.mark.anyio
B, S, KILLED_AT = 4, 1, 4


class World:
    """The quickstart's models around one broker in memory; only the learner dies."""

    def __init__(self, folder: Path, adapter_rank: int) -> None:
        self.folder, self.rank = folder, adapter_rank
        self.config, _ = configs.load("quickstart")
        self.method: Method = methods.load("forward_kl")
        self.student = resolve(self.config.student.model)
        self.tokenizer = Tokenizer.open(self.student)
        self.broker = MemoryBroker(Limits(groups_per_step=B, max_staleness=S), MemoryStore())
        self.head = {"run": "r", "method": self.method.digest, "born_s": time.time()}
        self.dataset, self.renderer = open_questions(self.config.data, 0, 0, self.student, {}, "r", self.method.digest)
        self.engine: Engine = open_engine(
            "hf", folder=self.student, stop_ids=self.tokenizer.stop_ids, loader=Loader(), max_inflight=B, student_k=0
        )
        teacher = resolve(self.config.teachers["default"].model)
        self.teacher = load_teachers({"default": (teacher, "float32")}, self.tokenizer.stop_ids, 512)["default"]
        self.seen: dict[int, dict[str, Tensor]] = {}  # n -> weights, of the life that is on

    def new_trainer(self) -> Trainer:
        return open_trainer(self.student, self.method, self.config, self.tokenizer, self.rank)

    async def publish(self, boot: str, n: int) -> Weights:
        return publish("r", boot, n, self.trainer.tensors(), self.student, self.folder / "weights", keep=4, fsync=False)

    async def live(self, saved_at: int) -> Lineage:
        """One life of a learner, to where it is killed: weights KILLED_AT are out, the newest checkpoint is `saved_at`."""
        self.trainer, self.seen = self.new_trainer(), {}
        lineage = Lineage(self.broker, self.trainer, self.folder / "state", self.publish, "data", self.method.digest, restamp=True)
        await lineage.start()
        while lineage.n < KILLED_AT:
            await self.write_a_batch()
            entry = await lineage.next_batch("learner", 0.0)
            assert entry is not None
            trained = self.trainer.train(decode(Batch, entry.body))
            await lineage.take_step(entry, trained.fates)
            self.seen[lineage.n] = {name: tensor.clone() for name, tensor in self.trainer.tensors().items()}
            if lineage.n == saved_at:
                await lineage.checkpoint()
        return lineage

    async def write_a_batch(self) -> None:
        """Questions, answers under the newest weights, the teacher's view, a batch: as much as the window lets in."""
        counters = await self.broker.counters()
        seqs = range(counters.issued, min(counters.issued + B, counters.fated + B * (S + 1)))
        await self.broker.issue(counters.boot, [(n, encode(self.renderer.prompt(n, self.dataset.question(n)))) for n in seqs])
        for entry in await self.broker.read(Stage.ISSUED, "generator", B):
            await self.broker.hand([HandOff(entry, encode(await self.answered(decode(Prompt, entry.body))))])
        for entry in await self.broker.read(Stage.GENERATED, "teacher", B):
            group = decode(Group, entry.body)
            (views,) = self.teacher.score([group], self.method.evidence)
            await self.broker.hand([HandOff(entry, encode(Scored(id=group.id, group=group, views=views, **self.head)))])
        entries = await self.broker.read(Stage.SCORED, "packer", B)
        if entries:
            await self.close(entries)

    async def answered(self, prompt: Prompt) -> Group:
        self.engine.swap_in(await self.broker.weights(), self.folder / "weights")
        ids = prompt.prompt_ids.numpy()
        self.engine.admit([Request(id=f"{prompt.id}.0", prompt_ids=ids, seed=(0, prompt.seq, 0), max_new=33)])
        answers = []
        while self.engine.inflight:
            answers += self.engine.step()
        return Group(id=prompt.id, prompt=prompt, rollouts=[answers[0].rollout(None)], **self.head)

    async def close(self, entries: Sequence) -> None:  # type: ignore[type-arg]
        n = (await self.broker.counters()).batchno
        batch = to_batch(n, "r", self.method.digest, time.time(), [decode(Scored, entry.body) for entry in entries])
        assert (await self.broker.close(entries, n, encode(batch)))[0] == "done"


def open_trainer(folder: Path, method: Method, config: Config, tokenizer: Tokenizer, rank: int) -> Trainer:
    """The quickstart's own optimizer; with adapters when they have a rank."""
    learn = config.learn
    return Trainer(
        folder, method, schedule=Schedule(lr=learn.lr, max_steps=20, warmup_steps=2, hold_fraction=0.4, min_lr_ratio=0.05),
        adam=AdamW(betas=learn.betas, weight_decay=learn.weight_decay, max_grad_norm=learn.max_grad_norm),
        adapter=Adapter(rank=rank, alpha=32.0, target_modules=learn.lora.target_modules) if rank else None,
        dtype="float32", stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id, max_age=2 * S,
        micro_batch_tokens=64, head_chunk=16, seed=0,
    )


@pytest.mark.parametrize("saved_at", [0, 2], ids=["from the start", "from a checkpoint with moments"])
@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
async def test_a_killed_learner_replays_its_pending_batches_bit_for_bit(tmp_path: Path, saved_at: int, rank: int) -> None:
    world = World(tmp_path, rank)
    await world.live(saved_at)
    before, counters = world.seen, await world.broker.counters()
    assert counters.steps == KILLED_AT
    lineage = await world.live(saved_at)
    assert lineage.boot == counters.boot, "the broker was rebuilt: nothing was replayed"
    assert list(world.seen) == list(range(saved_at + 1, KILLED_AT + 1))
    for n, weights in world.seen.items():
        for name, tensor in weights.items():
            assert torch.equal(tensor, before[n][name]), f"{name} of weights {n}"
