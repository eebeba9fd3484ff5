"""A teacher: its view of every token the student wrote."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from streamopd.assets import resolve
from streamopd.assets.vocabulary import vocab_size
from streamopd.config import Config
from streamopd.errors import GarbageRecord, TeacherAway, TeacherError, TeacherRefuses
from streamopd.prompts.open import questions_of
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Group, Scored
from streamopd.score.budget import Budget, tokens_of
from streamopd.score.check import check_evidence, check_same_ids
from streamopd.score.http import HttpTeacher, open_http_teacher
from streamopd.score.item import Views, refuse_slice_beyond
from streamopd.score.panel import Panel
from streamopd.score.probe import Student, probe, student_of
from streamopd.slots import EvidenceRequest, Method
from streamopd.topology import Stage
from streamopd.worker import Ended, Lease, Run, Worker

T = TypeVar("T")
AWAY_S = 2.0  # between two tries with a teacher that is away
UNUSABLE = 8  # answers in a row that cannot be used: it is not the items


class Teacher(Protocol):
    """Whoever scores: a model in this process, or servers outside the run."""

    @property
    def vocab_size(self) -> int: ...

    def score(self, groups: Sequence[Group], request: EvidenceRequest, beside: Sequence[Views] | None = None) -> list[Views]:
        """Views by group and rollout; `beside` a teacher's views, those of a reference."""
        ...


async def main(run: Run, worker: Worker) -> None:
    """Score groups with those of the panel that each prompt concerns; with nobody, where the method asks nobody."""
    try:
        panel = Panel.of(run.method, run.config.teachers)
        for note in panel.notes:
            await worker.emit("not_asked", note)
        limits = {name: named.token_limit for name, named in run.config.teachers.items() if named.token_limit}
        budgets = {name: Budget(name, limit, worker.broker) for name, limit in limits.items()}
        teachers = await open_teachers(run, worker, panel, budgets)
        desk = Desk(run, worker, panel, teachers, budgets)
        while True:
            leases = await worker.take(Stage.GENERATED, run.config.teacher.max_groups)
            for teacher_id in sorted({lease.record.prompt.teacher_id for lease in leases}):
                await desk.score(teacher_id, [lease for lease in leases if lease.record.prompt.teacher_id == teacher_id])
    except Ended:
        return


# ---------------------------------------------------------------- before the first group
async def open_teachers(run: Run, worker: Worker, panel: Panel, budgets: Mapping[str, Budget]) -> dict[str, Teacher]:
    """The panel's members: those of this process loaded, those outside probed; TeacherError with the sentence when one will not do."""
    config, tokenizer = run.config, Tokenizer.open(resolve(run.config.student.model))

    def heed() -> None:
        worker.leave_if_asked()
        worker.moved()

    teachers: dict[str, Teacher] = {}
    folders, size = folders_of(config, panel), vocab_size(resolve(config.student.model))
    refuse_slice_beyond(panel.evidence.slice_ids, "the student", size)
    if folders:
        from streamopd.score.local import load_teachers  # torch, only where a model is loaded

        local = await worker.compute(load_teachers, folders, tokenizer.stop_ids, config.teacher.token_budget, tokenizer.digest)
        for teacher in local.values():
            teacher.require(panel.evidence)
            teacher.moved = heed
        teachers |= local
    for teacher_id in panel.members:
        if teacher_id not in folders:
            outside = open_http_teacher(teacher_id, config.teachers[teacher_id], tokenizer, config.teacher.token_budget)
            outside.moved = heed
            student = await worker.compute(probed_student, config, run.method, teacher_id)
            await within(budgets.get(teacher_id), 1, outside, meet(run, worker, outside, student, panel))
            teachers[teacher_id] = outside
    return teachers


def folders_of(config: Config, panel: Panel) -> dict[str, tuple[Path, str]]:
    """(folder, dtype) by id, of the members whose model is this process's own."""
    folders: dict[str, tuple[Path, str]] = {}
    for teacher_id, teacher in config.teachers.items():
        if teacher_id in panel.members and not teacher.urls:
            folders[teacher_id] = (resolve(teacher.model), teacher.dtype)
    if panel.own_start:
        folders[panel.reference] = (resolve(config.student.model), config.student.dtype)
    return folders


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


async def meet(run: Run, worker: Worker, teacher: HttpTeacher, student: Student, panel: Panel) -> None:
    """Probe it. Once the run has begun, a teacher that is away is waited for."""
    found: list[str] = []
    role, request = panel.role(teacher.teacher_id), panel.request(teacher.teacher_id)
    while True:
        try:
            await worker.compute(probe, teacher, student, request, found.append, begun=worker.steps > 0, role=role)
            break
        except TeacherAway as error:
            await wait_for(worker, teacher.teacher_id, error)
            found.clear()
    await worker.emit("probe", f"{role} {teacher.teacher_id!r}: {'; '.join(found)}")


def probed_student(config: Config, method: Method, teacher_id: str) -> Student:
    """What a probe must know of the run: whose ids, how long, and the first and the longest question."""
    folder, panel = resolve(config.student.model), Panel.of(method, config.teachers)
    dataset, renderer = questions_of(config, method, "probe")
    prompts = [renderer.prompt(i, question) for i, question in enumerate([*dataset.heldout, *dataset.distinct()])]
    stop_ids, limit = Tokenizer.open(folder).stop_ids, config.generator.max_completion_length
    if teacher_id == panel.reference:
        contexts, ids = [prompt.prompt_ids.numpy() for prompt in prompts], panel.width(method.student_k, len(stop_ids))
    else:
        mine = [prompt for prompt in prompts if panel.pooled or prompt.teacher_id == teacher_id] or prompts
        contexts, ids = [(prompt.teacher_prompt_ids or prompt.prompt_ids).numpy() for prompt in mine], method.student_k
    return student_of(folder, stop_ids, ids, limit, [contexts[0], max(contexts, key=len)])


# ---------------------------------------------------------------- group after group
class Desk:
    """Groups on their way through the teachers, and what becomes of those that cannot be scored."""

    def __init__(
        self, run: Run, worker: Worker, panel: Panel, teachers: Mapping[str, Teacher], budgets: Mapping[str, Budget]
    ) -> None:
        self.run, self.worker, self.panel, self.teachers = run, worker, panel, teachers
        self.unusable = 0  # answers in a row
        self.budgets = budgets

    async def score(self, named: str, leases: list[Lease[Group]]) -> bool:
        """Hand on what can be used; False when a teacher is away and all went back. An item is at fault only when asked about alone."""
        if problem := self.panel.problem(named):
            await self._refuse(leases, problem)
            return True
        groups, said = [lease.record for lease in leases], dict[str, list[Views]]()
        for teacher_id in self.panel.asked(named):
            try:
                said[teacher_id] = await self._asked(teacher_id, groups, said)
            except TeacherAway as error:
                await self.worker.release(leases)
                await wait_for(self.worker, teacher_id, error)
                return False
            except GarbageRecord as error:
                return await self._one_by_one(named, teacher_id, leases, error)
        self.unusable = 0
        views = self.panel.together(groups, said)
        await self.worker.hand([(lease, scored(self.run, lease.record, of)) for lease, of in zip(leases, views, strict=True)])
        return True

    async def _asked(self, teacher_id: str, groups: Sequence[Group], said: Mapping[str, list[Views]]) -> list[Views]:
        """What one member thinks, within its budget: the reference beside the first teacher's views."""
        teacher, request = self.teachers[teacher_id], self.panel.request(teacher_id)
        beside = said[min(said)] if teacher_id == self.panel.reference else None
        ask = self.worker.compute(checked_views, teacher, groups, request, beside)
        if isinstance(teacher, HttpTeacher):
            tokens = tokens_of(groups, own_context=beside is not None)
            ask = within(self.budgets.get(teacher_id), tokens, teacher, ask)
        views = await ask
        self._count(teacher_id, views)
        return views

    def _count(self, teacher_id: str, views: Sequence[Views]) -> None:
        counter = f"teacher_tokens/{teacher_id}"
        tokens = sum(len(view.logprobs) for of_group in views for of_rollout in of_group for view in of_rollout)
        self.worker.counters[counter] = self.worker.counters.get(counter, 0.0) + tokens

    async def _one_by_one(self, named: str, teacher_id: str, leases: list[Lease[Group]], error: GarbageRecord) -> bool:
        if len(leases) > 1:
            for number, lease in enumerate(leases):
                if not await self.score(named, [lease]):
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


def checked_views(
    teacher: Teacher, groups: Sequence[Group], request: EvidenceRequest, beside: Sequence[Views] | None
) -> list[Views]:
    """What the teacher thinks; GarbageRecord when that cannot be true, or does not fit the views that it stands beside."""
    views = teacher.score(groups, request, beside)
    for number, (group, of_group) in enumerate(zip(groups, views, strict=True)):
        check_evidence(group, of_group, teacher.vocab_size)
        if beside is not None:
            check_same_ids(of_group, beside[number])
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
