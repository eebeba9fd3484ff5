"""The learner: batch n, one step, weights n + 1."""

from __future__ import annotations

import time

from streamopd.assets import resolve
from streamopd.errors import GarbageRecord
from streamopd.learn.final import unmark
from streamopd.learn.lineage import Lineage
from streamopd.learn.schedule import Schedule
from streamopd.learn.student import Adapter
from streamopd.learn.trainer import AdamW, Trained, Trainer
from streamopd.prompts.dataset import open_dataset
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Batch, StepDone, Weights, decode
from streamopd.slots import OWN_START
from streamopd.stream import BatchEntry, Counters
from streamopd.sync.adapter import Form, require_servable
from streamopd.sync.publish import publish
from streamopd.watch.journal import Journal, SampleLog, rewind
from streamopd.worker import Ended, Run, Worker
from streamopd.worker.worker import singleton


async def main(run: Run, worker: Worker) -> None:
    """Train batch after batch until the run is over, then write the final account and final/."""
    config = run.config
    trainer = await worker.compute(open_trainer, run)
    trainer.moved = worker.moved
    digest = open_dataset(config.data, config.seed, config.passes).digest

    source, lora = resolve(config.student.model), config.learn.lora
    form = Form(base=source, rank=lora.rank, alpha=lora.alpha, target_modules=lora.target_modules) if lora.rank else None
    if form:
        await worker.compute(require_servable, trainer.published(), source)

    async def publish_weights(boot: str, n: int) -> Weights:
        return await worker.compute(
            publish, run.id, boot, n, trainer.published(), source, run.weights_dir, config.sync.keep_versions, config.sync.fsync, form,
            trainer.course.stage,
        )

    durable = await worker.broker.durable()
    lineage = Lineage(worker.broker, trainer, run.state_dir, publish_weights, digest, run.method.digest, restamp=durable)
    async with singleton(worker):
        await lineage.start()
        unmark(run.folder / "final")
        worker.version = lineage.n
        for warning in lineage.warnings:
            await worker.emit("warning", warning)
        rewind(run.folder / "metrics.jsonl", lambda line: line["n"] <= lineage.n)
        await worker.emit("learner", f"lineage {lineage.number} begins at step {lineage.n}", n=lineage.n)
        await train(run, worker, lineage, trainer)
        await finish(run, worker, lineage, trainer)


def open_trainer(run: Run) -> Trainer:
    """The student under its optimizer."""
    config, learn = run.config, run.config.learn
    folder = resolve(config.student.model)
    tokenizer = Tokenizer.open(folder)
    return Trainer(
        folder,
        run.method,
        schedule=Schedule(
            lr=learn.lr, max_steps=learn.max_steps, warmup_steps=learn.warmup_steps,
            hold_fraction=learn.hold_fraction, min_lr_ratio=learn.min_lr_ratio,
        ),
        adam=AdamW(betas=learn.betas, weight_decay=learn.weight_decay, max_grad_norm=learn.max_grad_norm),
        adapter=Adapter(rank=learn.lora.rank, alpha=learn.lora.alpha, target_modules=learn.lora.target_modules)
        if learn.lora.rank
        else None,
        dtype=config.student.dtype, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id, max_age=config.max_age_steps,
        micro_batch_tokens=learn.micro_batch_tokens, head_chunk=learn.head_chunk, seed=config.seed,
        teachers={OWN_START: folder} | {name: resolve(teacher.model) for name, teacher in config.teachers.items() if teacher.model},
    )


async def train(run: Run, worker: Worker, lineage: Lineage, trainer: Trainer) -> None:
    """The loop: wait for batch n, train it, publish, write it down; a checkpoint now and then."""
    decoder = Tokenizer.open(resolve(run.config.student.model)).decode
    metrics, samples = Journal(run.folder / "metrics.jsonl"), SampleLog(run.folder / "samples.jsonl", decode=decoder)
    waited_s = 0.0
    while True:
        counters = await worker.broker.counters()
        if counters.boot != lineage.boot or not counters.stamped:
            await lineage.recover()
            continue
        if lineage.n == counters.steps and over(run, lineage, counters):
            return
        if worker.draining.is_set():  # this process is to leave, the run goes on
            await lineage.checkpoint()
        worker.leave_if_asked()
        start_s = time.monotonic()
        with worker.waiting("batches"):
            entry = await lineage.next_batch(worker.instance, 1.0)
        waited_s += time.monotonic() - start_s
        if entry is None:
            continue
        start_s = time.monotonic()
        batch = await read(run, worker, lineage, entry)
        if batch is None:
            continue
        stage = trainer.course.stage
        trained: Trained = await worker.compute(trainer.train, batch)
        await lineage.take_step(entry, trained.fates)
        if trainer.course.stage != stage:
            await worker.emit("stage", f"a plateau at step {lineage.n}: the method goes on to stage {trainer.course.stage}", n=lineage.n)
        worker.version = lineage.n
        seconds = {"wait_s": waited_s, "busy_s": time.monotonic() - start_s}
        waited_s = 0.0
        note(worker, lineage, entry, batch, trained, seconds, metrics, samples)
        if await due(run, lineage):
            await lineage.checkpoint()


def over(run: Run, lineage: Lineage, counters: Counters) -> bool:
    """Enough steps, or the run was asked to stop, or the data ended and every group has its fate."""
    enough = 0 < run.config.learn.max_steps <= lineage.n
    dry = counters.end == "drain" and counters.issued == counters.fated
    return enough or dry or run.stop_file.exists() or counters.end == "closed"


async def read(run: Run, worker: Worker, lineage: Lineage, entry: BatchEntry) -> Batch | None:
    """The batch, or None when it cannot be trusted: its groups are then issued again by a rebuild."""
    try:
        if entry.problem:
            raise GarbageRecord(entry.problem)
        batch = decode(Batch, entry.body, run.limits.max_record_bytes)
        seqs = [item.group.prompt.seq for item in batch.items]
        if batch.n != lineage.n or seqs != [seq for seq, _ in entry.members]:
            raise GarbageRecord(f"it says batch {batch.n} with groups {seqs[:4]}…, its entry says {lineage.n} with {entry.members[:4]}…")
        twice = [seq for seq in seqs if seq in lineage.record]
        if twice:
            raise GarbageRecord(f"its groups {twice[:4]} have a fate in the record already")
        return batch
    except ValueError as error:
        await worker.broker.quarantine(worker.instance, str(error), entry.body[:4096])
        await worker.emit("quarantine", f"batch {entry.n}: {error}", n=entry.n)
        await lineage.rebuild()
        return None


def note(
    worker: Worker, lineage: Lineage, entry: BatchEntry, batch: Batch, trained: Trained,
    seconds: dict[str, float], metrics: Journal, samples: SampleLog,
) -> None:
    """One line of metrics, a few samples, the counters."""
    seqs = [seq for (seq, _), fate in zip(entry.members, trained.fates, strict=True) if fate.value == "trained"]
    done = StepDone(
        n=lineage.n, born_s=time.time(), trained=seqs, age_steps=trained.age_steps,
        metrics={**trained.metrics, **seconds, "tokens_trained": trained.tokens_trained},
        trained_lengths=trained.trained_lengths, dropped_lengths=trained.dropped_lengths,
    )
    metrics.write(done)
    for item, (_, attempt), fate in zip(batch.items, entry.members, trained.fates, strict=True):
        samples.write(item, attempt, fate.value, n=lineage.n)
    worker.counters["steps"] = lineage.n
    worker.counters["tokens_trained"] = worker.counters.get("tokens_trained", 0.0) + trained.tokens_trained


async def due(run: Run, lineage: Lineage) -> bool:
    """A checkpoint every save_steps, and before too many batches wait for one."""
    if lineage.n - lineage.base[1] >= run.config.learn.save_steps:
        return True
    return await lineage.broker.retained_bytes() > run.config.learn.max_retained_mb << 20


async def finish(run: Run, worker: Worker, lineage: Lineage, trainer: Trainer) -> None:
    """The final account, and final/ as a folder that plain transformers loads."""
    checkpoint = await lineage.finish()
    await worker.compute(trainer.save_hf, run.folder / "final", checkpoint.n, run.id)
    await worker.emit("end", f"the run ended at step {checkpoint.n}", n=checkpoint.n, fed=checkpoint.fed)
    raise Ended
