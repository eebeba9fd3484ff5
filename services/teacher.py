"""A teacher: its view of every token the student wrote."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from streamopd.assets import resolve
from streamopd.config import Config
from streamopd.errors import GarbageRecord, TeacherAway, TeacherError, TeacherRefuses
from streamopd.prompts.open import open_questions
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Evidence, Group, Scored
from streamopd.score.budget import Budget, tokens_of
from streamopd.score.check import check_evidence
from streamopd.score.http import HttpTeacher, open_http_teacher
from streamopd.score.probe import Student, probe, student_of
from streamopd.slots import EvidenceRequest, Method
from streamopd.topology import Stage
from streamopd.worker import Ended, Lease, Run, Worker

T = TypeVar("T")
Views = list[list[Evidence]]
AWAY_S = 2.0  # between two tries with a teacher that is away
UNUSABLE = 8  # answers in a row that cannot be used: it is not the items


class Teacher(Protocol):
    """Whoever scores: a model in this process, or servers outside the run."""

    @property
    def vocab_size(self) -> int: ...

    def score(self, groups: Sequence[Group], request: EvidenceRequest) -> list[Views]: ...


async def main(run: Run, worker: Worker) -> None:
    """Score groups with the teacher that each prompt names."""
    try:
        limits = {name: named.token_limit for name, named in run.config.teachers.items() if named.token_limit}
        budgets = {name: Budget(name, limit, worker.broker) for name, limit in limits.items()}
        teachers = await open_teachers(run, worker, budgets)
        desk = Desk(run, worker, teachers, budgets)
        while True:
            leases = await worker.take(Stage.GENERATED, run.config.teacher.max_groups)
            for teacher_id in sorted({lease.record.prompt.teacher_id for lease in leases}):
                await desk.score(teacher_id, [lease for lease in leases if lease.record.prompt.teacher_id == teacher_id])
    except Ended:
        return


# ---------------------------------------------------------------- before the first group
async def open_teachers(run: Run, worker: Worker, budgets: Mapping[str, Budget]) -> dict[str, Teacher]:
    """Those of this process loaded, those outside probed; TeacherError with the sentence when one will not do."""
    config, tokenizer = run.config, Tokenizer.open(resolve(run.config.student.model))

    def heed() -> None:
        worker.leave_if_asked()
        worker.moved()

    teachers: dict[str, Teacher] = {}
    folders = {name: (resolve(t.model), t.dtype) for name, t in config.teachers.items() if not t.urls}
    if folders:
        from streamopd.score.local import load_teachers  # torch, only where a model is loaded

        local = await worker.compute(load_teachers, folders, tokenizer.stop_ids, config.teacher.token_budget, tokenizer.digest)
        for teacher in local.values():
            teacher.moved = heed
        teachers |= local
    for teacher_id, named in config.teachers.items():
        if named.urls:
            outside = open_http_teacher(teacher_id, named, tokenizer, config.teacher.token_budget)
            outside.moved = heed
            student = await worker.compute(probed_student, config, run.method, teacher_id)
            await within(budgets.get(teacher_id), 1, outside, meet(run, worker, outside, student))
            teachers[teacher_id] = outside
    return teachers


async def within(budget: Budget | None, tokens: int, teacher: HttpTeacher, ask: Coroutine[Any, Any, T]) -> T:
    """Ask within a budget, where there is one: `tokens` are reserved, and what was really asked is counted whatever came of it."""
    if budget is None:
        return await ask
    try:
        await budget.require(tokens)
    except TeacherError:
        ask.close()
        raise
    try:
        return await ask
    finally:
        await budget.settle(tokens, teacher.asked_tokens)


async def meet(run: Run, worker: Worker, teacher: HttpTeacher, student: Student) -> None:
    """Probe it. Once the run has begun, a teacher that is away is waited for."""
    found: list[str] = []
    while True:
        try:
            await worker.compute(probe, teacher, student, run.method.evidence, found.append, begun=worker.steps > 0)
            break
        except TeacherAway as error:
            await wait_for(worker, teacher.teacher_id, error)
            found.clear()
    await worker.emit("probe", f"teacher {teacher.teacher_id!r}: {'; '.join(found)}")


def probed_student(config: Config, method: Method, teacher_id: str) -> Student:
    """What a probe must know of the run: whose ids, how long, and the first and the longest question."""
    folder = resolve(config.student.model)
    turns = {name: teacher.teacher_prompt for name, teacher in config.teachers.items()}
    dataset, renderer = open_questions(config.data, config.seed, config.passes, folder, turns, "probe", method.digest)
    prompts = [renderer.prompt(i, question) for i, question in enumerate([*dataset.heldout, *dataset.distinct()])]
    mine = [prompt for prompt in prompts if prompt.teacher_id == teacher_id] or prompts
    contexts = [(prompt.teacher_prompt_ids or prompt.prompt_ids).numpy() for prompt in mine]
    limit = config.generator.max_completion_length
    return student_of(folder, Tokenizer.open(folder).stop_ids, method.student_k, limit, [contexts[0], max(contexts, key=len)])


# ---------------------------------------------------------------- group after group
class Desk:
    """Groups on their way through the teachers, and what becomes of those that cannot be scored."""

    def __init__(self, run: Run, worker: Worker, teachers: dict[str, Teacher], budgets: Mapping[str, Budget]) -> None:
        self.run, self.worker, self.teachers = run, worker, teachers
        self.unusable = 0  # answers in a row
        self.budgets = budgets

    async def score(self, teacher_id: str, leases: list[Lease[Group]]) -> bool:
        """Hand on what can be used; False when the teacher is away and all went back. An item is at fault only when asked about alone."""
        if teacher_id not in self.teachers:
            await self._refuse(leases, f"no teacher is called {teacher_id!r}; there are: {', '.join(sorted(self.teachers))}")
            return True
        try:
            groups = [lease.record for lease in leases]
            views = await self._asked(teacher_id, groups)
        except TeacherAway as error:
            await self.worker.release(leases)
            await wait_for(self.worker, teacher_id, error)
            return False
        except GarbageRecord as error:
            return await self._one_by_one(teacher_id, leases, error)
        self.unusable = 0
        await self.worker.hand([(lease, scored(self.run, lease.record, of)) for lease, of in zip(leases, views, strict=True)])
        return True

    async def _asked(self, teacher_id: str, groups: Sequence[Group]) -> list[Views]:
        """What the teacher thinks, within its budget."""
        teacher = self.teachers[teacher_id]
        ask = self.worker.compute(checked_views, teacher, groups, self.run.method.evidence)
        if not isinstance(teacher, HttpTeacher):
            return await ask
        return await within(self.budgets.get(teacher_id), tokens_of(groups), teacher, ask)

    async def _one_by_one(self, teacher_id: str, leases: list[Lease[Group]], error: GarbageRecord) -> bool:
        if len(leases) > 1:
            for number, lease in enumerate(leases):
                if not await self.score(teacher_id, [lease]):
                    await self.worker.release(leases[number + 1 :])
                    return False
            return True
        self.unusable += 1
        await self._refuse(leases, str(error))
        if self.unusable >= UNUSABLE:
            raise TeacherError(f"Teacher {teacher_id!r} gave {UNUSABLE} unusable answers in a row; the last: {error}. Look at its log.")
        return True

    async def _refuse(self, leases: list[Lease[Group]], reason: str) -> None:
        for lease in leases:
            await self.worker.refuse(lease.entry, reason)


def checked_views(teacher: Teacher, groups: Sequence[Group], request: EvidenceRequest) -> list[Views]:
    """What the teacher thinks; GarbageRecord when that cannot be true."""
    views = teacher.score(groups, request)
    for group, of_group in zip(groups, views, strict=True):
        check_evidence(group, of_group, teacher.vocab_size)
    return views


async def wait_for(worker: Worker, teacher_id: str, error: TeacherAway) -> None:
    """A while, visibly; TeacherError when waiting does not help."""
    if isinstance(error, TeacherRefuses):
        raise TeacherError(f"{error}. Look at teachers.{teacher_id}.url and key_env.") from None
    await worker.emit("away", f"{worker.instance} waits for its teacher: {error}", teacher=teacher_id)
    with worker.waiting(f"teacher {teacher_id!r}: {error}"):
        await asyncio.sleep(AWAY_S)
    worker.leave_if_asked()


def scored(run: Run, group: Group, views: Views) -> Scored:
    """The group with its views."""
    return Scored(id=group.id, run=run.id, method=run.method.digest, born_s=time.time(), group=group, views=views)
