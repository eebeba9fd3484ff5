"""A teacher: its view of every token the student wrote."""

from __future__ import annotations

import time

from streamopd.assets import resolve
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Evidence, Group, Scored
from streamopd.score.check import check_evidence
from streamopd.score.local import load_teachers
from streamopd.topology import Stage
from streamopd.worker import Ended, Lease, Run, Worker

Views = list[list[Evidence]]


async def main(run: Run, worker: Worker) -> None:
    """Score groups with the teacher that each prompt names."""
    config = run.config
    tokenizer = Tokenizer.open(resolve(config.student.model))
    folders = {name: (resolve(teacher.model), teacher.dtype) for name, teacher in config.teachers.items()}
    teachers = await worker.compute(load_teachers, folders, tokenizer.stop_ids, config.teacher.token_budget, tokenizer.digest)
    for teacher in teachers.values():
        teacher.moved = worker.moved
    try:
        while True:
            leases = await worker.take(Stage.GENERATED, config.teacher.max_groups)
            for teacher_id in sorted({lease.record.prompt.teacher_id for lease in leases}):
                mine = [lease for lease in leases if lease.record.prompt.teacher_id == teacher_id]
                if teacher_id not in teachers:
                    await refuse(worker, mine, f"no teacher is called {teacher_id!r}; there are: {', '.join(sorted(teachers))}")
                    continue
                teacher = teachers[teacher_id]
                views = await worker.compute(teacher.score, [lease.record for lease in mine], run.method.evidence)
                await worker.hand(await checked(run, worker, teacher.vocab_size, list(zip(mine, views, strict=True))))
    except Ended:
        return


async def refuse(worker: Worker, leases: list[Lease[Group]], reason: str) -> None:
    for lease in leases:
        await worker.refuse(lease.entry, reason)


async def checked(run: Run, worker: Worker, vocab_size: int, pairs: list[tuple[Lease[Group], Views]]) -> list[tuple[Lease[Group], Scored]]:
    """The scored groups whose evidence can be true; the others are quarantined."""
    good = []
    for lease, views in pairs:
        try:
            check_evidence(lease.record, views, vocab_size)
            good.append((lease, scored(run, lease.record, views)))
        except ValueError as error:
            await worker.refuse(lease.entry, str(error))
    return good


def scored(run: Run, group: Group, views: Views) -> Scored:
    """The group with its views."""
    return Scored(id=group.id, run=run.id, method=run.method.digest, born_s=time.time(), group=group, views=views)
