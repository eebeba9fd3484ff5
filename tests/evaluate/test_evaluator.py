"""The evaluator looks once at each student, at the end only at the end of this run, and leaves when it is asked to."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from streamopd import config as configs
from streamopd.assets import resolve
from streamopd.errors import StreamopdError
from streamopd.learn.final import mark, unmark
from streamopd.schemas import Weights
from streamopd.services.evaluator import Exam, Results, final_step, follow
from streamopd.services.evaluator import main as evaluate
from streamopd.stream.memory import MemoryBroker, MemoryStore
from streamopd.sync.publish import publish
from streamopd.watch.journal import Journal, read
from streamopd.worker import Ended, Run, Worker

pytestmark = pytest.mark.anyio
STUDENT, TEACHER = resolve("asset:quickstart-student"), resolve("asset:quickstart-teacher")
FEW = ("data.heldout_size=3", "generator.max_completion_length=6", "evaluate.every_steps=2")


class World:
    """A run folder, and a broker that a test can bring to any step."""

    def __init__(self, folder: Path) -> None:
        self.run = Run.create(folder, configs.load("quickstart", FEW)[0])
        self.store = MemoryStore()
        self.broker = MemoryBroker(self.run.limits, self.store)
        self.lives = 0

    @property
    def lines(self) -> list[tuple[str, int]]:
        """Who was examined at which n, in order."""
        return [(line["who"], line["n"]) for line in read(self.run.folder / "evaluations.jsonl")]

    def publish(self, n: int) -> Weights:
        """The teacher's weights as those of step n."""
        weights = load_file(TEACHER / "model.safetensors")
        return publish(self.run.id, f"life{self.lives}", n, weights, STUDENT, self.run.weights_dir, keep=1, fsync=False)

    async def reach(self, n: int, manifest: Weights | None = None) -> None:
        """A new life of the broker, at step n."""
        self.lives += 1
        assert await self.broker.rebuild(f"life{self.lives}", self.lives, n, {}, manifest) == "done"

    async def close(self) -> None:
        await self.broker.finish(f"life{self.lives}", self.lives)

    def save_final(self, n: int) -> None:
        """final/ as the learner of step n leaves it."""
        shutil.copytree(TEACHER, self.run.folder / "final", dirs_exist_ok=True)
        mark(self.run.folder / "final", self.run.id, n)

    def worker(self) -> Worker:
        return Worker(self.run, "evaluator", "evaluator-0", MemoryBroker(self.run.limits, self.store), inline=True)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "run")


@pytest.fixture
async def worker(world: World) -> AsyncIterator[Worker]:
    async with world.worker() as worker:
        yield worker


def an_exam(world: World) -> Exam:
    return Exam(world.run, lambda: None)


# ---------------------------------------------------------------- before and after
async def test_teacher_student_and_the_end_of_the_run_are_examined_once(world: World) -> None:
    await world.reach(3)
    await world.close()
    world.save_final(3)
    for _ in range(2):
        async with world.worker() as worker:
            await evaluate(world.run, worker)
        assert world.lines == [("teacher:default", 0), ("student", 0), ("student", 3)]
    before, after = (line["metrics"] for line in read(world.run.folder / "evaluations.jsonl")[1:])
    assert before["kl_teacher_student"] > 0.1
    assert after["kl_teacher_student"] == pytest.approx(0, abs=1e-5), "final/ holds the teacher's own weights here"


@pytest.mark.parametrize(
    ("there", "words"), [(2, "has step 2 "), ("another run", "has no folder of this run"), (None, "has no folder of this run")]
)
async def test_a_final_that_is_not_of_this_end_is_waited_out_and_then_told(
    world: World, worker: Worker, there: Any, words: str
) -> None:
    await world.reach(3)
    await world.close()
    await worker.look()
    if isinstance(there, int):
        world.save_final(there)
    elif there:
        shutil.copytree(TEACHER, world.run.folder / "final")
        mark(world.run.folder / "final", there, 3)
    with pytest.raises(StreamopdError, match=f"The run ended at step 3, but .*final {words}"):
        await final_step(world.run, worker, 0.0)
    world.save_final(3)
    assert await final_step(world.run, worker, 0.0) == 3


async def test_a_run_that_is_taken_up_again_is_followed_again(world: World, worker: Worker) -> None:
    """It is closed until its learner leads; the end that counts comes later."""
    await world.reach(3)
    await world.close()
    world.save_final(3)
    unmark(world.run.folder / "final")
    await worker.look()
    waiting = asyncio.create_task(final_step(world.run, worker, 60.0))
    await world.reach(3)
    assert await waiting is None


async def test_an_evaluator_that_is_to_leave_sits_no_exam_more(world: World) -> None:
    async with world.worker() as worker:
        worker.draining.set()
        with pytest.raises(Ended):
            await evaluate(world.run, worker)
    assert world.lines == []


def test_an_exam_asks_before_each_of_its_parts(world: World) -> None:
    asked: list[int] = []
    exam = Exam(world.run, lambda: asked.append(0))
    exam.student(STUDENT, 0)
    assert len(asked) == 5  # the student greedy and sampled, its teacher both ways, the distance


# ---------------------------------------------------------------- in between
async def test_published_weights_are_examined_every_so_many_steps(world: World, worker: Worker) -> None:
    await world.reach(2, world.publish(2))
    await worker.look()
    exam, results = an_exam(world), Results(world.run.folder / "evaluations.jsonl", worker)
    following = asyncio.create_task(follow(world.run, worker, exam, results))
    while not world.lines:
        await asyncio.sleep(0.01)
    await world.close()
    await following
    assert world.lines == [("student", 2)]
    (found,) = (line["metrics"] for line in read(world.run.folder / "evaluations.jsonl"))
    assert found == exam.student(TEACHER, 2).metrics, "what was published are the teacher's weights"


async def test_weights_that_are_gone_are_left_out_for_the_next_version(world: World, worker: Worker) -> None:
    gone = world.publish(2)
    shutil.rmtree(world.run.weights_dir / gone.folder)
    await world.reach(2, gone)
    await worker.look()
    results = Results(world.run.folder / "evaluations.jsonl", worker)
    following = asyncio.create_task(follow(world.run, worker, an_exam(world), results))
    while not [event for _, event in await world.broker.events("0") if event.kind == "behind"]:
        await asyncio.sleep(0.01)
    await world.reach(3, world.publish(3))
    while not world.lines:
        await asyncio.sleep(0.01)
    await world.close()
    await following
    assert world.lines == [("student", 3)]
    assert len([event for _, event in await world.broker.events("0") if event.kind == "behind"]) == 1


async def test_what_is_known_already_is_not_examined_again(world: World, worker: Worker) -> None:
    Journal(world.run.folder / "evaluations.jsonl").write({"who": "student", "n": 4})
    results = Results(world.run.folder / "evaluations.jsonl", worker)

    def examine() -> Any:
        raise AssertionError("it was examined before")

    await results.add("student", 4, examine)
    assert results.newest == 4
    assert world.lines == [("student", 4)]
