"""A teacher: its view of every token the student wrote."""

from __future__ import annotations

import time

from streamopd.assets import resolve
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Group, Scored
from streamopd.score.local import load_teachers
from streamopd.topology import Stage
from streamopd.worker import Ended, Lease, Run, Worker


async def main(run: Run, worker: Worker) -> None:
    """Score groups with the teacher that each prompt names."""
    config = run.config
    stop_ids = Tokenizer.open(resolve(config.student.model)).stop_ids
    folders = {name: (resolve(teacher.model), teacher.dtype) for name, teacher in config.teachers.items()}
    teachers = await worker.compute(load_teachers, folders, stop_ids, config.teacher.token_budget)
    try:
        while True:
            leases = await worker.take(Stage.GENERATED, config.teacher.max_groups)
            for teacher_id in sorted({lease.record.prompt.teacher_id for lease in leases}):
                mine = [lease for lease in leases if lease.record.prompt.teacher_id == teacher_id]
                if teacher_id not in teachers:
                    await refuse(worker, mine, f"no teacher is called {teacher_id!r}; there are: {', '.join(sorted(teachers))}")
                    continue
                views = await worker.compute(teachers[teacher_id].score, [lease.record for lease in mine], run.method.evidence)
                await worker.hand([(lease, scored(run, lease.record, seen)) for lease, seen in zip(mine, views, strict=True)])
    except Ended:
        return


async def refuse(worker: Worker, leases: list[Lease[Group]], reason: str) -> None:
    for lease in leases:
        await worker.refuse(lease.entry, reason)


def scored(run: Run, group: Group, views: list) -> Scored:  # type: ignore[type-arg]
    """The group with its views."""
    return Scored(id=group.id, run=run.id, method=run.method.digest, born_s=time.time(), group=group, views=views)
