"""The evaluator: is it better? Held-out figures before and after, beside the teacher's, and in between when asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from streamopd.assets import resolve
from streamopd.errors import StreamopdError, SwapRefused
from streamopd.evaluate.heldout import Heldout, accuracy, kl_heldout, shown, student_context, teacher_context
from streamopd.evaluate.text import text_perplexity
from streamopd.generate.engine import Request
from streamopd.generate.hf import HFEngine
from streamopd.grade.graders import choose
from streamopd.grade.graders import load as load_grader
from streamopd.learn.final import marked_step
from streamopd.prompts.open import questions_of
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Evaluation, Outcome, Prompt, Weights
from streamopd.sync.swap import Loader
from streamopd.watch.journal import Journal, read
from streamopd.worker import Run, Worker

FINAL_WAIT_S = 120.0  # from the end of the run to the learner's final/
LOOK_S = 0.2


async def main(run: Run, worker: Worker) -> None:
    """The student as it was and its teachers, then the student as it is."""
    if not run.config.evaluate.enabled:
        return
    exam = await worker.compute(Exam, run, worker.leave_if_asked)
    results = Results(run.folder / "evaluations.jsonl", worker)
    for teacher_id in exam.teacher_ids:
        await results.add(f"teacher:{teacher_id}", 0, exam.teacher, teacher_id)
    await results.add("student", 0, exam.student, resolve(run.config.student.model), 0)
    while True:
        await follow(run, worker, exam, results)
        n = await final_step(run, worker, FINAL_WAIT_S)
        if n is not None:
            await results.add("student", n, exam.student, run.folder / "final", n)
            return


class Results:
    """evaluations.jsonl: who was examined at which n. Nobody sits the same exam twice."""

    def __init__(self, file: Path, worker: Worker) -> None:
        self.worker, self.journal = worker, Journal(file)
        self.known = {(line["who"], line["n"]) for line in read(file)}

    @property
    def newest(self) -> int:
        """The latest student that was examined."""
        return max((n for who, n in self.known if who == "student"), default=0)

    async def add(self, who: str, n: int, examine: Callable[..., Evaluation], *values: object) -> None:
        """Write `examine(*values)` down, unless it is known."""
        if (who, n) not in self.known:
            self.journal.write(await self.worker.compute(examine, *values))
            self.known.add((who, n))


async def follow(run: Run, worker: Worker, exam: Exam, results: Results) -> None:
    """Until the run is over; a look at the newest weights every `evaluate.every_steps` steps."""
    every, refused = run.config.evaluate.every_steps, -1
    while not worker.closed:
        worker.leave_if_asked()
        newest = worker.weights
        if not every or newest is None or newest.n < results.newest + every or newest.n == refused:
            with worker.waiting("the end of the run"):
                await asyncio.sleep(LOOK_S)
            continue
        try:
            await worker.compute(exam.swap_in, newest, run.weights_dir)
        except (SwapRefused, OSError) as error:  # deleted by now, as a rule: the next version will do
            refused = newest.n
            await worker.emit("behind", f"{worker.instance} did not look at weights {newest.n}: {error}", wanted=newest.n)
        else:
            await results.add("student", newest.n, exam.swapped, newest.n)


async def final_step(run: Run, worker: Worker, wait_s: float) -> int | None:
    """The step at which the run ended, once final/ holds its weights; None when the run goes on after all.

    A run that is taken up again is closed in the broker, and has the final/ of its last end, until its learner leads.
    """
    deadline_s = time.monotonic() + wait_s
    while worker.closed:
        worker.leave_if_asked()
        steps, found = int((await worker.broker.counters()).steps), marked_step(run.folder / "final", run.id)
        if found == steps:
            return steps
        if time.monotonic() > deadline_s:
            there = "no folder of this run" if found is None else f"step {found}"
            raise StreamopdError(
                f"The run ended at step {steps}, but {run.folder / 'final'} has {there} after {wait_s:.0f} s: the learner did not "
                "save its student, so there is no figure for the end. Its log says why; the same command resumes the run."
            )
        with worker.waiting("final/"):
            await asyncio.sleep(LOOK_S)
    return None


class Exam:
    """The held-out questions, and the models that sit it. `heed` is called before each part, and may raise to end it."""

    def __init__(self, run: Run, heed: Callable[[], None]) -> None:
        config = run.config
        student = resolve(config.student.model)
        dataset, renderer = questions_of(config, run.method, run.id)
        self.config, self.heed = config, heed
        self.tokenizer = Tokenizer.open(student)
        self.prompts = [renderer.prompt(i, question) for i, question in enumerate(dataset.heldout)]
        self.grader = load_grader(choose(config.data.grader, config.data.train))
        self.teachers: dict[str, HFEngine] = {}
        self.teacher_answers: dict[str, Heldout] = {}
        self.live: HFEngine | None = None  # takes published weights, one version after another

    @property
    def teacher_ids(self) -> list[str]:
        """Those who have held-out questions, and a model here: one that is only a url cannot sit an exam."""
        here = {name for name, teacher in self.config.teachers.items() if teacher.model}
        return sorted({prompt.teacher_id for prompt in self.prompts} & here)

    def teacher(self, teacher_id: str) -> Evaluation:
        """The teacher on its own questions, in its own context."""
        engine = self._teacher(teacher_id)
        prompts = [prompt for prompt in self.prompts if prompt.teacher_id == teacher_id]
        greedy = self._sit(engine, prompts, greedy=True, teacher=True)
        metrics = dict(greedy.metrics)
        if self.config.evaluate.sampled:
            self.teacher_answers[teacher_id] = self._sit(engine, prompts, greedy=False, teacher=True)
            metrics |= self.teacher_answers[teacher_id].metrics
        return self._evaluation(f"teacher:{teacher_id}", 0, metrics, greedy)

    def student(self, folder: Path, n: int) -> Evaluation:
        """The student in `folder`, and how far it is from its teachers."""
        return self._examine(self._open(folder, self.config.student.dtype), n)

    def swap_in(self, weights: Weights, weights_dir: Path) -> None:
        """Published weights into the one student that takes them; SwapRefused or OSError when they cannot be had."""
        if self.live is None:
            self.live = self._open(resolve(self.config.student.model), self.config.student.dtype)
        self.live.swap_in(weights, weights_dir)

    def swapped(self, n: int) -> Evaluation:
        """The student of the published weights `n`, which were swapped in."""
        assert self.live is not None, "no weights were swapped in"
        assert self.live.version == n, f"weights {self.live.version} are in, not {n}"
        return self._examine(self.live, n)

    def _examine(self, engine: HFEngine, n: int) -> Evaluation:
        greedy = self._sit(engine, self.prompts, greedy=True)
        metrics = dict(greedy.metrics)
        if self.config.evaluate.sampled:
            sampled = self._sit(engine, self.prompts, greedy=False)
            metrics |= sampled.metrics | self._distance(engine, sampled)
        if self.tokenizer.has_chat_template:  # a model of language: what did it do to plain text?
            self.heed()
            metrics["text_perplexity"] = text_perplexity(engine.model, self.tokenizer.encode)
        return self._evaluation("student", n, metrics, greedy)

    def _distance(self, engine: HFEngine, sampled: Heldout) -> dict[str, float]:
        """KL both ways, each on its author's own samples."""
        for teacher_id in self.teacher_ids:
            if teacher_id not in self.teacher_answers:
                self.teacher(teacher_id)
        self.heed()
        teachers = {name: self._teacher(name).model for name in self.teacher_ids}
        theirs = [answer for name in self.teacher_ids for answer in self.teacher_answers[name].answers]
        ours = [answer for answer in sampled.answers if answer.prompt.teacher_id in teachers]
        return kl_heldout(engine.model, teachers, theirs, ours)

    def _sit(self, engine: HFEngine, prompts: list[Prompt], greedy: bool, teacher: bool = False) -> Heldout:
        self.heed()
        engine.temperature = 0.0 if greedy else (self.config.generator.temperature or 1.0)
        return accuracy(
            engine, Request, prompts, self._grade, self.tokenizer.decode, kind="greedy" if greedy else "sampled",
            max_new=self.config.generator.max_completion_length, context=teacher_context if teacher else student_context,
        )

    def _grade(self, asked: list[tuple[Prompt, str, bool]]) -> list[Outcome | None]:
        return [self.grader(*answer) for answer in asked]

    def _teacher(self, teacher_id: str) -> HFEngine:
        """The teacher's engine; teachers of one model share it."""
        teacher = self.config.teachers[teacher_id]
        key = f"{teacher.model} {teacher.dtype}"
        if key not in self.teachers:
            self.teachers[key] = self._open(resolve(teacher.model), teacher.dtype)
        return self.teachers[key]

    def _open(self, folder: Path, dtype: str) -> HFEngine:
        return HFEngine(
            folder, stop_ids=self.tokenizer.stop_ids, loader=Loader(folder), dtype=dtype,
            max_inflight=self.config.evaluate.batch_size,
        )

    def _evaluation(self, who: str, n: int, metrics: dict[str, float], greedy: Heldout) -> Evaluation:
        samples = shown(greedy, self.tokenizer.decode, self.config.evaluate.show)
        return Evaluation(who=who, n=n, born_s=time.time(), metrics=metrics, samples=samples)
