"""A generator: the student answers, in flight while its weights change."""

from __future__ import annotations

import asyncio
import contextlib
import time

import numpy as np

from streamopd.assets import resolve
from streamopd.errors import SwapRefused
from streamopd.generate.commission import commission, writing_teacher
from streamopd.generate.engine import Answer, Engine, Request
from streamopd.generate.open import open_engine
from streamopd.generate.rest import Rest
from streamopd.generate.steps import delimiter_ids, with_steps
from streamopd.grade.graders import choose
from streamopd.grade.pool import GradingPool
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Group, Prompt, Weights
from streamopd.slots import Behaviour, progress_of
from streamopd.sync.drill import drill
from streamopd.sync.swap import Loader
from streamopd.topology import Stage
from streamopd.worker import Ended, Lease, Run, Worker

RETRY_S = 1.0  # between two tries to load a version
BITE_S = 0.02  # decoding between two looks at the stream


async def main(run: Run, worker: Worker) -> None:
    """Take prompts, decode, swap between two tokens, grade, hand groups on."""
    student = resolve(run.config.student.model)
    tokenizer = Tokenizer.open(student)
    engine = open_engine(run.config.generator.engine, **engine_values(run, tokenizer))
    if run.config.sync.drill and run.config.generator.engine != "scripted":
        found = await worker.compute(drill, engine, student, run.weights_dir, run.id, run.config.student.dtype)
        await worker.emit("drill", f"swap drill: log-probs moved by {found.moved:.2g} nats, {found.error:.1g} from a plain forward")
    data = run.config.data
    graders = GradingPool(choose(data.grader, data.train), run.config.generator.grade_timeout_s, workers=0 if worker.inline else 1)
    desk = Desk(run, worker, engine, tokenizer, graders)
    try:
        while True:
            await desk.swap_to_newest()
            await desk.admit()
            await desk.hand_finished(await worker.compute(desk.decode_a_while))
            await desk.rest_if_idle()
    except Ended:
        await desk.leave()
    finally:
        graders.close()
        desk.give_up()


def engine_values(run: Run, tokenizer: Tokenizer) -> dict[str, object]:
    """What an engine must know of the run."""
    g, base, teachers = run.config.generator, resolve(run.config.student.model), run.config.teachers
    writer = writing_teacher(run.method, g.engine, g.temperature, teachers)
    return dict(
        folder=base, stop_ids=tokenizer.stop_ids, loader=Loader(base),
        max_inflight=g.max_inflight, temperature=g.temperature, top_p=g.top_p, student_k=run.method.student_k,
        kv=g.kv, dtype=run.config.student.dtype, memory_fraction=g.memory_fraction, sleeps=g.sleep_after_s > 0,
        teacher=resolve(teachers[writer].model) if writer else None, teacher_dtype=teachers[writer].dtype if writer else "float32",
    )


def behaviour_under(run: Run, version: int, stage: int = 0) -> Behaviour:
    """What an answer is begun under, while weights `version` are served."""
    return run.method.at(progress_of(version, run.config.learn.max_steps), stage).behaviour


class Desk:
    """The groups this generator is writing: which answers are in, and under which weights."""

    def __init__(self, run: Run, worker: Worker, engine: Engine, tokenizer: Tokenizer, graders: GradingPool) -> None:
        self.run, self.worker, self.engine, self.tokenizer, self.graders = run, worker, engine, tokenizer, graders
        self.writing: dict[str, tuple[Lease[Prompt], list[Answer]]] = {}
        self.written: list[tuple[Lease[Prompt], list[Answer]]] = []  # whole groups, not handed on yet
        self.served: tuple[str, int] = ("", -1)  # (boot, n) of the weights in the engine
        self.behaviour = behaviour_under(run, 0)
        self.refused: tuple[str, int] = ("", -1)  # the version that would not load
        self.refused_s = 0.0                      # since when
        self.next_try_s = 0.0
        self.swap_s: list[float] = []
        self.coming: tuple[Weights, asyncio.Task[None]] | None = None  # read and verified while answers go on
        self.rest = Rest(engine, run.config.generator.sleep_after_s)
        self.delimiters = delimiter_ids(run.config.generator.step_delimiter, tokenizer.decode, tokenizer.ids)

    async def swap_to_newest(self, at_once: bool = False) -> None:
        """Serve the newest manifest, requests in flight going on; another boot voids them first. Else it may still be on its way."""
        newest = self.worker.weights
        if newest is None or not self._newer_weights():
            return
        if newest.boot != self.served[0]:
            self.engine.abort()
            self.writing.clear()
            self.written.clear()
        elif newest.n < self.served[1]:
            return
        inflight, wanted = self.engine.inflight, newest
        try:
            if at_once or not inflight or self.worker.inline:
                await self._let_arrive()
            else:
                wanted, arriving = self.coming = self.coming or self._send_for(newest)
                if not arriving.done():
                    return
                self.coming = None
                await arriving
            await self._be_awake()
            swapped = await self.worker.compute(self.engine.swap_in, wanted, self.run.weights_dir)
        except (SwapRefused, OSError) as error:
            await self._fall_behind(wanted, error)
            return
        if self.served[1] < 0:
            await self.worker.emit("serve", f"{self.worker.instance} serves weights {wanted.n}, verified", n=wanted.n)
        self._note_swap(wanted, swapped.pause_s, inflight)

    def _send_for(self, weights: Weights) -> tuple[Weights, asyncio.Task[None]]:
        return weights, asyncio.create_task(self.worker.compute(self.engine.prepare, weights, self.run.weights_dir))

    async def _let_arrive(self) -> None:
        """Wait for what is on its way; what is wrong with it is seen when it is swapped in."""
        if self.coming is not None:
            with contextlib.suppress(SwapRefused, OSError):
                await self.coming[1]
            self.coming = None

    async def admit(self) -> None:
        """Take as many prompts as the engine has room for; give back what these weights may not answer."""
        room = self._room()
        too_old = self.served[1] < self.worker.steps - self.run.config.max_staleness
        if self.served[0] != self.worker.boot or too_old or (room == 0 and self.engine.inflight):
            self.worker.leave_if_over()
            if not self.engine.inflight:
                await self.worker.news(f"weights >= {self.worker.steps - self.run.config.max_staleness}")
            return
        leases = await self.worker.take(Stage.ISSUED, max(1, room), block_s=0.0 if self.engine.inflight else 1.0)
        if any(lease.record and lease.entry.min_version > self.served[1] for lease in leases):
            await self.worker.look()
            await self.swap_to_newest(at_once=True)
        good = [lease for lease in leases if self.worker.holds(lease) and lease.entry.min_version <= self.served[1]]
        await self.worker.release([lease for lease in leases if lease not in good])
        if len(good) < len(leases):
            await self.worker.news(f"weights >= {max(lease.entry.min_version for lease in leases)}", 0.2)
        if good:
            await self._be_awake()
        for lease in good:
            self.writing[lease.record.id] = (lease, [])
            self.engine.admit(self._requests(lease.record))

    def _room(self) -> int:
        """Prompts for whose answers there are slots, and tokens however long prompt and answers become."""
        config = self.run.config
        slots, limit = self.engine.free // config.group_size, config.generator.max_inflight_tokens
        return max(0, min(slots, (limit - self.engine.inflight_tokens) // config.group_tokens)) if limit else slots

    async def rest_if_idle(self) -> None:
        """Give the GPU's memory to the others when nobody has asked for a while."""
        if self.rest.due:
            await self.worker.compute(self.rest.sleep)
            await self.worker.emit("sleep", f"{self.worker.instance} sleeps: nobody asks, its GPU memory is free")

    async def _be_awake(self) -> None:
        if self.rest.asleep:
            await self.worker.compute(self.rest.wake)
            await self.worker.emit("wake", f"{self.worker.instance} is awake again")

    def decode_a_while(self) -> list[Answer]:
        """Token after token until new weights are out or BITE_S have passed: going to a thread and back for each costs more."""
        answers: list[Answer] = []
        until_s = time.monotonic() + BITE_S
        while self.engine.inflight and not self._swap_is_due() and time.monotonic() < until_s:
            answers += self.engine.step()
            self.worker.moved()
        return answers

    def _swap_is_due(self) -> bool:
        return self._newer_weights() and (self.coming is None or self.coming[1].done())

    def _newer_weights(self) -> bool:
        newest = self.worker.weights
        return newest is not None and (newest.boot, newest.n) != self.served and not self._given_up(newest)

    async def hand_finished(self, answers: list[Answer]) -> None:
        """Grade and hand on groups whose answers are all in, many at once: every hand-off is a write to disk."""
        for answer in answers:
            group_id = answer.request.id.rpartition(".")[0]
            if group_id not in self.writing:
                continue
            got = self.writing[group_id][1]
            got.append(answer)
            self._count("tokens", len(answer.completion_ids) if answer.request.gold_ids is None else 0)
            if len(got) == self.run.config.group_size:
                self.written.append(self.writing.pop(group_id))
        enough = len(self.written) * self.run.config.group_size >= self.run.config.answers_inflight // 2
        if self.written and (enough or not self.engine.inflight):
            done, self.written = self.written, []
            groups = await self._graded(done)
            await self.worker.hand(list(zip([lease for lease, _ in done], groups, strict=True)))

    async def leave(self) -> None:
        """What is unfinished goes back to the stream."""
        self.engine.abort()
        await self.worker.release([lease for lease, _ in (*self.writing.values(), *self.written)])
        await self._let_arrive()

    def give_up(self) -> None:
        """Whatever ended the service has been told; what was on its way is no news any more."""
        if self.coming is not None:
            self.coming[1].cancel()

    def _requests(self, prompt: Prompt) -> list[Request]:
        config = self.run.config
        return commission(
            prompt, self.behaviour, count=config.group_size, run_seed=config.seed, max_new=config.generator.max_completion_length
        )

    async def _graded(self, done: list[tuple[Lease[Prompt], list[Answer]]]) -> list[Group]:
        asked = [
            (lease.record, self.tokenizer.decode(answer.completion_ids.tolist()), answer.finish.value == "stop")
            for lease, answers in done for answer in answers
        ]
        outcomes = iter(await self.graders.grade(asked))
        if self.graders.last_problem:
            await self.worker.emit("grader", self.graders.last_problem)
            self.graders.last_problem = ""
        return [
            Group(
                id=lease.record.id, run=self.run.id, method=self.run.method.digest, born_s=time.time(), prompt=lease.record,
                rollouts=[with_steps(answer.rollout(next(outcomes)), self.delimiters) for answer in answers],
            )
            for lease, answers in done
        ]

    def _given_up(self, newest: Weights) -> bool:
        """A version that would not load is tried again every second, until its deadline."""
        if (newest.boot, newest.n) != self.refused:
            return False
        now_s = time.monotonic()
        return now_s < self.next_try_s or now_s > self.refused_s + self.run.config.generator.swap_deadline_s

    async def _fall_behind(self, newest: Weights, error: Exception) -> None:
        """Not hung: the old version is served on, and everybody can see why."""
        self.next_try_s = time.monotonic() + RETRY_S
        self.worker.behind = str(error)
        self._count("swaps_refused", 1)
        if self.refused != (newest.boot, newest.n):
            self.refused, self.refused_s = (newest.boot, newest.n), time.monotonic()
            text = f"{self.worker.instance} did not load weights {newest.n} (still {self.served[1]}): {error}"
            await self.worker.emit("behind", text, wanted=newest.n, served=self.served[1])

    def _note_swap(self, newest: Weights, seconds: float, inflight: int) -> None:
        self.served = (newest.boot, newest.n)
        self.behaviour = behaviour_under(self.run, newest.n, newest.stage)
        self.worker.version, self.worker.behind = newest.n, ""
        self._count("swaps", 1)
        self._count("swaps_in_flight", 1 if inflight else 0)
        self.swap_s.append(seconds)
        self.worker.counters["swap_median_s"] = float(np.median(self.swap_s[-200:]))

    def _count(self, name: str, by: float) -> None:
        self.worker.counters[name] = self.worker.counters.get(name, 0.0) + by
