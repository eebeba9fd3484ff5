"""The learner's side of the protocol: which life of the broker it speaks to, what n is, and what the record holds."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from streamopd.errors import ConfigError, Fenced, StreamopdError
from streamopd.learn.checkpoint import Checkpoint, grant_lineage, load_newest, newest_lineage, save
from streamopd.learn.trainer import Trainer
from streamopd.schemas import Fate, Weights
from streamopd.stream import BatchEntry, Broker

Publish = Callable[[str, int], Awaitable[Weights]]
OWN = (Fate.TRAINED.value, Fate.EXPIRED.value)
MAX_STARTS = 3  # of one batch; more convict it


class Lineage:
    """One learner's claim on the run. The disk grants it; the broker is fenced by it."""

    def __init__(
        self, broker: Broker, trainer: Trainer, state_dir: Path, publish: Publish, dataset_digest: str, method_digest: str,
        restamp: bool,
    ) -> None:
        self.broker, self.trainer, self.state_dir, self.publish = broker, trainer, state_dir, publish
        self.dataset_digest, self.method_digest = dataset_digest, method_digest
        self.warnings: list[str] = []   # of checkpoints that could not be read
        self.restamp = restamp          # appendfsync always on one node: a restarted server has lost nothing
        self.number = 0
        self.boot = ""
        self.n = 0
        self.steps = 0                  # whose weights and fates the broker has
        self.record: dict[int, str] = {}
        self.base = (0, 0)              # (lineage, n) of the checkpoint that was loaded or written last

    # ---------------------------------------------------------------- start
    async def start(self) -> None:
        """Take a lineage, fence the learner before, then load; join the broker's life or rebuild it.

        A run that had ended is taken up again: what was left unused is issued again.
        """
        self.number = grant_lineage(self.state_dir)
        before = await self.broker.counters()
        if before.boot:
            self._heed(await self.broker.lead(before.boot, self.number, self.restamp))
        done = self._load()
        now = await self.broker.counters()
        same_life = bool(now.boot) and now.stamped and now.boot == self.boot and self.base >= await self.broker.committed()
        if not same_life or done:
            await self.rebuild()
            await self.checkpoint()  # so that a kill before the next one costs a replay and not another rebuild
            return
        self.steps = now.steps
        known = [seq for seq in await self.broker.fates() if seq in self.record]
        self._heed(await self.broker.commit(self.boot, self.number, self.base, known))

    def _load(self) -> bool:
        """The newest checkpoint into memory; whether its run had ended."""
        found = load_newest(self.state_dir)
        if found is None:
            return False
        checkpoint, folder = found.checkpoint, found.folder
        self.warnings = found.warnings
        if checkpoint.dataset_digest != self.dataset_digest:
            raise ConfigError(
                f"The data changed: the checkpoint {folder.name} was made with dataset {checkpoint.dataset_digest}, "
                f"this run has {self.dataset_digest}. Give back the old data or seed, or start over with --fresh."
            )
        if checkpoint.method_digest != self.method_digest:
            raise ConfigError(
                f"The method changed: the checkpoint {folder.name} was made with {checkpoint.method_digest}, this run has "
                f"{self.method_digest}. Give back the old method, or start over with --fresh."
            )
        self.trainer.load(folder)
        self.boot, self.n, self.record = checkpoint.boot, checkpoint.n, dict(checkpoint.record)
        self.base = (checkpoint.lineage, checkpoint.n)
        return checkpoint.done

    async def rebuild(self) -> None:
        """A new life of the broker, from memory at n: what the record lacks is issued again."""
        self._still_newest()
        boot = secrets.token_hex(6)
        manifest = await self.publish(boot, self.n)
        self._heed(await self.broker.rebuild(boot, self.number, self.n, self.record, manifest))
        self.boot, self.steps = boot, self.n

    # ---------------------------------------------------------------- a step
    async def next_batch(self, consumer: str, block_s: float) -> BatchEntry | None:
        """Batch n and no other; a batch that killed three learners is convicted instead."""
        entry = await self.broker.batch(self.n, consumer, block_s)
        if entry is None or entry.boot != self.boot:  # of another life: `recover` comes next
            return None
        if await self.broker.start_batch(self.boot, self.number, self.n) > MAX_STARTS:
            await self.convict(entry)
            return None
        return entry

    async def convict(self, entry: BatchEntry) -> None:
        """Its groups are dead in the record; the rest of the flight is issued again."""
        self.record.update({seq: "dead:killed the learner" for seq, _ in entry.members})
        await self.rebuild()

    async def take_step(self, entry: BatchEntry, fates: Sequence[Fate]) -> str:
        """n is done: record, publish, and let weights and fates appear together."""
        self.record.update({seq: fate.value for (seq, _), fate in zip(entry.members, fates, strict=True)})
        self.n += 1
        replayed = self.n <= self.steps  # its weights are the same, bit for bit, and out already
        manifest = None if replayed else await self.publish(self.boot, self.n)
        named = [(seq, attempt, fate) for (seq, attempt), fate in zip(entry.members, fates, strict=True)]
        answer = await self._in_this_life(lambda: self.broker.step(self.boot, self.number, self.n, manifest, named))
        self.steps = max(self.steps, self.n)
        return answer

    async def recover(self) -> bool:
        """The broker is not the life I speak of: stamp it again where nothing can be lost (True), else rebuild from memory."""
        self._still_newest()
        now = await self.broker.counters()
        if now.boot == self.boot and self.restamp:
            return self._heed(await self.broker.lead(self.boot, self.number, True)) == "done"
        await self.rebuild()
        return False

    async def _in_this_life(self, call: Callable[[], Awaitable[str]]) -> str:
        """Make a call, and again when the broker only awaited its stamp; after a rebuild it has no object any more."""
        while self._heed(answer := await call()) == "amnesia":
            if not await self.recover():
                break
        return answer

    # ---------------------------------------------------------------- checkpoint and end
    async def checkpoint(self) -> None:
        """Write the record beside the weights, then let the broker forget what it holds."""
        others = await self.broker.fates()
        self.record.update({seq: fate for seq, fate in others.items() if fate not in OWN})
        self._save(done=False)
        known = [seq for seq in others if seq in self.record]
        await self._in_this_life(lambda: self.broker.commit(self.boot, self.number, self.base, known))

    async def finish(self) -> Checkpoint:
        """Shut the door and write the final account: fed = fated + unused, exactly."""
        finished = await self.broker.finish(self.boot, self.number)
        while finished == "amnesia" and await self.recover():
            finished = await self.broker.finish(self.boot, self.number)
        if isinstance(finished, str):
            self._heed(finished)
            raise StreamopdError(f"The run could not be closed: the broker answered {finished!r}. Start it again to resume.")
        self.record.update({seq: fate for seq, fate in finished.fates.items() if fate not in OWN})
        return self._save(done=True, unused=finished.unused, fed=finished.issued)

    def _save(self, done: bool, unused: Sequence[int] = (), fed: int = 0) -> Checkpoint:
        checkpoint = Checkpoint(
            boot=self.boot, lineage=self.number, n=self.n, record=self.record, dataset_digest=self.dataset_digest,
            method_digest=self.method_digest, done=done, unused=list(unused), fed=fed,
        )
        save(self.state_dir, checkpoint, self.trainer)
        self.base = (self.number, self.n)
        return checkpoint

    def _heed(self, answer: str) -> str:
        if answer == "fenced":
            raise Fenced(f"learner of lineage {self.number} is fenced: a newer one leads this run. It leaves.")
        return answer

    def _still_newest(self) -> None:
        newest = newest_lineage(self.state_dir)
        if newest > self.number:
            self._heed("fenced")


def count_fates(record: Mapping[int, str]) -> dict[str, int]:
    """Groups by fate, reasons kept: {"trained": 31936, "filtered:short": 3, …}."""
    counts: dict[str, int] = {}
    for fate in record.values():
        counts[fate] = counts.get(fate, 0) + 1
    return counts
