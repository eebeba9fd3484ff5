"""The packer: exactly one step's worth of groups into a batch; what is filtered or selected out has its reason."""

from __future__ import annotations

import time
from functools import partial

from streamopd.assets import resolve
from streamopd.pack.close import to_batch
from streamopd.pack.filters import refusals
from streamopd.pack.sift import sift
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Fate, Scored, encode
from streamopd.stream import Counters
from streamopd.topology import Stage
from streamopd.watch.journal import SampleLog
from streamopd.worker import Ended, Lease, Run, Worker
from streamopd.worker.worker import singleton


async def main(run: Run, worker: Worker) -> None:
    """Sweep what is scored, filter and select, and close a batch when a step is full or the flight is at its end."""
    samples = SampleLog(run.folder / "samples.jsonl", decode=Tokenizer.open(resolve(run.config.student.model)).decode)
    buffer: list[Lease[Scored]] = []
    try:
        async with singleton(worker):
            while True:
                buffer = [lease for lease in buffer if worker.holds(lease)]
                buffer += await fill(run, worker, samples, wanted=run.config.learn.groups_per_step - len(buffer))
                counters = await worker.broker.counters()
                if len(buffer) == run.config.learn.groups_per_step or (buffer and at_the_end(counters, len(buffer))):
                    await close(run, worker, counters.batchno, buffer)
    except Ended:
        return


async def fill(run: Run, worker: Worker, samples: SampleLog, wanted: int) -> list[Lease[Scored]]:
    """Scored groups of which something goes on; the others get their fate."""
    worker.leave_if_over()
    if wanted <= 0:
        return []
    with worker.waiting("scored"):
        entries = await worker.broker.sweep(Stage.SCORED, worker.instance, worker.held_ids, wanted, 1.0)
    pack, method, kept = run.config.pack, run.method, []
    filters = (pack.min_completion_length, pack.drop_truncated, pack.drop_incorrect, method.needs_teacher)
    counter = f"selected_out/{type(method.select).__name__}"
    for lease in await worker.open(entries, Scored):
        lease.record, reason, selected_out = sift(lease.record, refusals(lease.record, *filters), method.select)
        if selected_out:
            worker.counters[counter] = worker.counters.get(counter, 0.0) + selected_out
        if reason is None:
            kept.append(lease)
            continue
        await worker.in_this_life(lease.entry, partial(worker.broker.fate, lease.entry, Fate.FILTERED, reason))
        worker.forget([lease])
        samples.write(lease.record, lease.entry.attempt, f"filtered:{reason}", n=-1)
    return kept


def at_the_end(counters: Counters, held: int) -> bool:
    """No more data, and the rest of the flight is in hand."""
    return counters.end == "drain" and held == sum(n for stage, n in counters.inflight.items() if stage != "batched")


async def close(run: Run, worker: Worker, n: int, buffer: list[Lease[Scored]]) -> None:
    """One batch, all or nothing; what the broker calls stale leaves the buffer."""
    batch = to_batch(n, run.id, run.method.digest, time.time(), [lease.record for lease in buffer])
    answer, stale = await worker.broker.close([lease.entry for lease in buffer], n, encode(batch))
    if answer == "stale":
        worker.forget([lease for lease in buffer if lease.entry.id in stale])
    elif answer in ("done", "already"):
        worker.forget(buffer)
        worker.moved(len(buffer))
    else:
        await worker.news("the batch before, or the learner's stamp", 0.1)
