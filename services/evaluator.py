"""The evaluator: is it better? Held-out figures before and after, beside the teacher's, and in between when asked."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from streamopd.assets import resolve
from streamopd.evaluate.heldout import Heldout, accuracy, kl_heldout, shown, student_context, teacher_context
from streamopd.evaluate.text import text_perplexity
from streamopd.generate.engine import Request
from streamopd.generate.hf import HFEngine
from streamopd.grade.graders import choose
from streamopd.grade.graders import load as load_grader
from streamopd.prompts.open import open_questions
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Evaluation, Outcome, Prompt
from streamopd.sync.swap import swap_in
from streamopd.watch.journal import Journal, read
from streamopd.worker import Ended, Run, Worker

FINAL_WAIT_S = 120.0


async def main(run: Run, worker: Worker) -> None:
    """The student as it was and its teachers, then the student as it is."""
    exam = await worker.compute(Exam, run)
    journal = Journal(run.folder / "evaluations.jsonl")
    known = {(line["who"], line["n"]) for line in read(run.folder / "evaluations.jsonl")}
    for teacher_id in exam.teacher_ids:
        if (f"teacher:{teacher_id}", 0) not in known:
            journal.write(await worker.compute(exam.teacher, teacher_id))
    if ("student", 0) not in known:
        journal.write(await worker.compute(exam.student, resolve(run.config.student.model), 0))
    await follow(run, worker, exam, journal)
    steps = int((await worker.broker.counters()).steps)
    folder = await final_folder(run.folder)
    if folder is not None and steps:
        journal.write(await worker.compute(exam.student, folder, steps))


async def follow(run: Run, worker: Worker, exam: Exam, journal: Journal) -> None:
    """Until the run is over; a look at the newest weights every `evaluate.every_steps` steps."""
    every, last = run.config.evaluate.every_steps, 0
    while not worker.closed:
        if worker.draining.is_set():
            raise Ended
        newest = worker.weights
        if every and newest is not None and newest.n >= last + every:
            last = newest.n
            journal.write(await worker.compute(exam.student, run.weights_dir / newest.folder, newest.n))
        else:
            with worker.waiting("the end of the run"):
                await asyncio.sleep(0.2)


async def final_folder(run_folder: Path) -> Path | None:
    """final/, once the learner has written it; None when it never does."""
    deadline_s = time.monotonic() + FINAL_WAIT_S
    while not (run_folder / "final" / "config.json").is_file():
        if time.monotonic() > deadline_s:
            return None
        await asyncio.sleep(0.1)
    return run_folder / "final"


class Exam:
    """The held-out questions, and the models that sit it."""

    def __init__(self, run: Run) -> None:
        config = run.config
        contexts = {name: teacher.teacher_prompt for name, teacher in config.teachers.items()}
        student = resolve(config.student.model)
        dataset, renderer = open_questions(
            config.data, config.seed, config.passes, student, contexts, run.id, run.method.digest
        )
        self.config = config
        self.tokenizer = Tokenizer.open(student)
        self.prompts = [renderer.prompt(i, question) for i, question in enumerate(dataset.heldout)]
        self.grader = load_grader(choose(config.data.grader, config.data.train))
        self.engines: dict[Path, HFEngine] = {}
        self.teacher_answers: dict[str, Heldout] = {}

    @property
    def teacher_ids(self) -> list[str]:
        """Those who have held-out questions."""
        return sorted({prompt.teacher_id for prompt in self.prompts})

    def teacher(self, teacher_id: str) -> Evaluation:
        """The teacher on its own questions, in its own context."""
        engine = self._engine(resolve(self.config.teachers[teacher_id].model))
        prompts = [prompt for prompt in self.prompts if prompt.teacher_id == teacher_id]
        greedy = self._sit(engine, prompts, greedy=True, teacher=True)
        metrics = dict(greedy.metrics)
        if self.config.evaluate.sampled:
            self.teacher_answers[teacher_id] = self._sit(engine, prompts, greedy=False, teacher=True)
            metrics |= self.teacher_answers[teacher_id].metrics
        return self._evaluation(f"teacher:{teacher_id}", 0, metrics, greedy)

    def student(self, folder: Path, n: int) -> Evaluation:
        """The student in `folder`, and how far it is from its teachers."""
        engine = self._open(folder)
        greedy = self._sit(engine, self.prompts, greedy=True)
        metrics = dict(greedy.metrics)
        if self.config.evaluate.sampled:
            sampled = self._sit(engine, self.prompts, greedy=False)
            metrics |= sampled.metrics | self._distance(engine, sampled)
        if self.tokenizer.has_chat_template:  # a model of language: what did it do to plain text?
            metrics["text_perplexity"] = text_perplexity(engine.model, self.tokenizer.encode)
        return self._evaluation("student", n, metrics, greedy)

    def _distance(self, engine: HFEngine, sampled: Heldout) -> dict[str, float]:
        """KL both ways, each on its author's own samples."""
        for teacher_id in self.teacher_ids:
            if teacher_id not in self.teacher_answers:
                self.teacher(teacher_id)
        teachers = {name: self._engine(resolve(self.config.teachers[name].model)).model for name in self.teacher_ids}
        theirs = [answer for name in self.teacher_ids for answer in self.teacher_answers[name].answers]
        return kl_heldout(engine.model, teachers, theirs, sampled.answers)

    def _sit(self, engine: HFEngine, prompts: list[Prompt], greedy: bool, teacher: bool = False) -> Heldout:
        engine.temperature = 0.0 if greedy else (self.config.generator.temperature or 1.0)
        return accuracy(
            engine, Request, prompts, self._grade, self.tokenizer.decode, kind="greedy" if greedy else "sampled",
            max_new=self.config.generator.max_completion_length, context=teacher_context if teacher else student_context,
        )

    def _grade(self, asked: list[tuple[Prompt, str, bool]]) -> list[Outcome | None]:
        return [self.grader(*answer) for answer in asked]

    def _engine(self, folder: Path) -> HFEngine:
        if folder not in self.engines:
            self.engines[folder] = self._open(folder)
        return self.engines[folder]

    def _open(self, folder: Path) -> HFEngine:
        return HFEngine(
            folder, stop_ids=self.tokenizer.stop_ids, swap=swap_in, dtype=self.config.student.dtype,
            max_inflight=self.config.evaluate.batch_size,
        )

    def _evaluation(self, who: str, n: int, metrics: dict[str, float], greedy: Heldout) -> Evaluation:
        samples = shown(greedy, self.tokenizer.decode, self.config.evaluate.show)
        return Evaluation(who=who, n=n, born_s=time.time(), metrics=metrics, samples=samples)
