"""The generator's desk between the stream and an engine: weights arrive beside answers, and an idle engine sleeps."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from streamopd import config as configs
from streamopd import slots
from streamopd.assets import resolve
from streamopd.errors import ConfigError, SwapRefused
from streamopd.generate.engine import Request, Swapped
from streamopd.generate.rest import Rest
from streamopd.generate.scripted import ScriptedEngine
from streamopd.grade.pool import GradingPool
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Array, Prompt, Weights, encode
from streamopd.services.generator import Desk
from streamopd.slots import Linear, Method, OnPolicy, TeacherPrefix
from streamopd.stream.memory import MemoryBroker, MemoryStore
from streamopd.topology import Stage
from streamopd.worker import Run, Worker

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


class Engine(ScriptedEngine):
    """It says what was done to it; preparing takes as long as `gate` is shut."""

    def __init__(self) -> None:
        super().__init__(folder=resolve("asset:quickstart-student"), stop_ids=(), max_inflight=8, token_s=0.005)
        self.gate, self.done, self.asleep = threading.Event(), list[str](), False
        self.refuses = ""

    def prepare(self, manifest: Weights, weights_dir: Path) -> None:
        self.gate.wait(10)
        self.done.append(f"prepare {manifest.n}")
        if self.refuses:
            raise SwapRefused(self.refuses)

    def swap_in(self, manifest: Weights, weights_dir: Path) -> Swapped:
        assert not self.asleep
        self.done.append(f"swap {manifest.n}")
        return super().swap_in(manifest, weights_dir)

    def sleep(self) -> None:
        assert not self.inflight
        self.asleep = True

    def wake(self) -> None:
        self.asleep = False


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
async def desk(tmp_path: Path, engine: Engine) -> Desk:
    config, _ = configs.load("quickstart")
    run = Run.create(tmp_path, config)
    worker = Worker(run, "generator", "generator-0", MemoryBroker(run.limits, MemoryStore()))
    tokenizer = Tokenizer.open(resolve(config.student.model))
    desk = Desk(run, worker, engine, tokenizer, GradingPool("none", 1.0, workers=0))
    await put(desk, 0)
    engine.gate.set()
    await desk.swap_to_newest()
    assert engine.done == ["swap 0"]
    return desk


async def put(desk: Desk, n: int, stage: int = 0) -> None:
    desk.worker.weights, desk.worker.boot = Weights(run="r", boot="b", n=n, folder=f"w{n}", stage=stage), "b"


def question(seq: int = 0, run: str = "r", method: str = "m", length: int = 1) -> Prompt:
    ids = Array.of(np.ones(length, np.int32), "int32")
    return Prompt(id=f"p{seq}", run=run, method=method, born_s=0.0, seq=seq, prompt_ids=ids)


def write_something(engine: Engine) -> None:
    engine.admit([Request(id="a.0", prompt_ids=np.array([1], np.int32), seed=(0,), max_new=10_000)])
    engine.step()


async def test_answers_go_on_while_weights_arrive(desk: Desk, engine: Engine) -> None:
    write_something(engine)
    engine.gate.clear()
    await put(desk, 1)
    await desk.swap_to_newest()
    desk.decode_a_while()
    assert engine.version == 0, "they are not here yet"
    assert not desk._swap_is_due()
    engine.gate.set()
    while not desk._swap_is_due():
        await asyncio.sleep(0.01)
    await desk.swap_to_newest()
    assert engine.done == ["swap 0", "prepare 1", "swap 1"]
    assert desk.served == ("b", 1)


async def test_what_an_answer_is_begun_under_moves_with_the_weights(desk: Desk, engine: Engine) -> None:
    desk.run.method = Method(name="prefixes", summary="", behaviour=TeacherPrefix(tokens=Linear(32.0, 0.0)))
    desk.run.config = msgspec.structs.replace(desk.run.config, learn=msgspec.structs.replace(desk.run.config.learn, max_steps=9))
    for n, tokens in ((1, 28.0), (6, 8.0), (8, 0.0), (9, 0.0)):
        await put(desk, n)
        await desk.swap_to_newest()
        assert desk.behaviour == TeacherPrefix(tokens=tokens)
        begun = {request.behaviour for request in desk._requests(question())}
        assert begun == {TeacherPrefix(tokens=tokens) if tokens else OnPolicy()}


async def test_the_weights_say_which_stage_answers_are_begun_in(desk: Desk, engine: Engine) -> None:
    """A stage may end early, and its learner alone knows."""
    stages = tuple(slots.Stage(until=until, branches=(), behaviour=TeacherPrefix(tokens=10 * until)) for until in (0.5, 0.8, 1.0))
    desk.run.method = Method(name="stages", summary="", stages=stages)
    desk.run.config = msgspec.structs.replace(desk.run.config, learn=msgspec.structs.replace(desk.run.config.learn, max_steps=101))
    for n, stage, tokens in ((1, 0, 5.0), (2, 1, 8.0), (50, 1, 8.0), (80, 1, 10.0), (81, 2, 10.0)):
        await put(desk, n, stage)
        await desk.swap_to_newest()
        assert desk.behaviour == TeacherPrefix(tokens=tokens)


async def test_with_nothing_in_flight_nobody_waits_beside(desk: Desk, engine: Engine) -> None:
    await put(desk, 1)
    await desk.swap_to_newest()
    assert engine.done == ["swap 0", "swap 1"]


async def test_who_must_have_them_waits_for_what_is_on_its_way(desk: Desk, engine: Engine) -> None:
    write_something(engine)
    engine.gate.clear()
    await put(desk, 1)
    await desk.swap_to_newest()
    engine.gate.set()
    await desk.swap_to_newest(at_once=True)
    assert engine.done == ["swap 0", "prepare 1", "swap 1"]


async def test_weights_that_are_refused_on_their_way_leave_the_old_ones(desk: Desk, engine: Engine) -> None:
    write_something(engine)
    engine.refuses = "the manifest says A, the file has B"
    await put(desk, 1)
    while not desk.worker.behind:
        await desk.swap_to_newest()
        await asyncio.sleep(0.01)
    assert "the file has B" in desk.worker.behind
    assert (engine.version, desk.served) == (0, ("b", 0))


async def test_an_engine_that_sleeps_is_woken_for_new_weights(desk: Desk, engine: Engine) -> None:
    desk.rest = Rest(engine, 1e-6)
    await desk.rest_if_idle()
    await asyncio.sleep(0.001)
    await desk.rest_if_idle()
    assert engine.asleep
    await put(desk, 1)
    await desk.swap_to_newest()
    assert not engine.asleep
    kinds = [event.kind for _, event in await desk.worker.broker.events()]
    assert kinds[-2:] == ["sleep", "wake"]


# ---------------------------------------------------------------- how much is taken: 8 slots; 2 answers of at most 6 + 4 tokens each
def limited(tokens: int) -> configs.Config:
    keys = ("group_size=2", "data.max_prompt_length=6", "generator.max_completion_length=4", f"generator.max_inflight_tokens={tokens}")
    return configs.load("quickstart", keys)[0]


@pytest.mark.parametrize(
    ("limit", "length", "at_once"),
    [
        (0, 2, 8),   # all slots
        (44, 2, 6),  # 24, then 12 as 20 are left; then 8 are left, and the next prompt could want 20
        (20, 6, 2),  # one group is all that it admits
        (20, 2, 2),  # and 8 tokens are no group
    ],
)
async def test_no_more_is_taken_than_may_be_in_flight(desk: Desk, engine: Engine, limit: int, length: int, at_once: int) -> None:
    desk.run.config = limited(limit)
    broker, head = desk.worker.broker, (desk.run.id, desk.run.method.digest, length)
    await broker.lead("b", 1, False)
    assert await broker.rebuild("b", 1, 0, {}, desk.worker.weights) == "done"
    assert await broker.issue("b", [(seq, encode(question(seq, *head))) for seq in range(6)]) == ["done"] * 6
    most, handed = 0, 0
    while handed < 6:
        for _ in range(4):
            await desk.admit()
            assert not limit or engine.inflight_tokens <= limit
        most = max(most, engine.inflight)
        await desk.hand_finished(desk.decode_a_while())
        handed += len(await broker.read(Stage.GENERATED, "teacher", 6))
    assert most == at_once


@pytest.mark.parametrize("tokens", [19, -1])
def test_a_limit_under_which_no_group_fits_is_refused_with_both_numbers(tokens: int) -> None:
    with pytest.raises(ConfigError, match=rf"max_inflight_tokens is {tokens}, and the answers to one prompt may come to 20 tokens"):
        limited(tokens)
