"""Services in miniature: real workers on a real broker, without models. What they do is named by the test.

    python -m tests.cli.fakes SERVICE FOLDER NAME ACT
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from streamopd.cli.child import Command
from streamopd.errors import ConfigError
from streamopd.learn.checkpoint import Checkpoint, grant_lineage, load_newest, save
from streamopd.worker import Ended, Run, Worker
from streamopd.worker.process import Main, serve


class Weightless:
    """A trainer with nothing to keep."""

    nbytes = 0

    def save(self, folder: Path) -> None:
        (folder / "trainer.txt").write_text("nothing")


def commands(**acts: str) -> Command:
    """What starts the named services, each with its act."""
    return lambda folder, service, name: [
        sys.executable, "-m", "tests.cli.fakes", service, str(folder), name, acts.get(service, "idle")
    ]


# ---------------------------------------------------------------- learners
async def train(run: Run, worker: Worker) -> None:
    """Open the stream, do steps without groups to the last, close, and write the final account and final/."""
    number = await lead(run, worker)
    for n in range(worker.steps + 1, run.config.learn.max_steps + 1):
        await step(worker, number, n)
        if run.stop_file.exists():
            break
    await close(run, worker, number)


async def train_on_and_on(run: Run, worker: Worker) -> None:
    """Steps without an end, until people ask to stop."""
    number, n = await lead(run, worker), 0
    while not run.stop_file.exists():
        n += 1
        await step(worker, number, n)
        await asyncio.sleep(0.02)
    await close(run, worker, number)


async def train_slowly(run: Run, worker: Worker) -> None:
    """Each step is seen, and the last one by an evaluator that is there."""
    number = await lead(run, worker)
    await step(worker, number, 1)
    while not any(beat.service == "evaluator" for beat in await worker.broker.beats()):
        await asyncio.sleep(0.05)
    await step(worker, number, 2)
    await close(run, worker, number)


async def lead(run: Run, worker: Worker) -> int:
    number, found = grant_lineage(run.state_dir), load_newest(run.state_dir)
    n = found.checkpoint.n if found else 0
    assert await worker.broker.rebuild(f"boot{number}", number, n, {}, None) == "done"
    await worker.look()
    await worker.emit("opened", "")
    return number


async def step(worker: Worker, number: int, n: int) -> None:
    await worker.broker.step(worker.boot, number, n, None, [])
    worker.moved()


async def close(run: Run, worker: Worker, number: int) -> None:
    await worker.look()
    await worker.broker.finish(worker.boot, number)
    save(run.state_dir, Checkpoint(
        boot=worker.boot, lineage=number, n=worker.steps, record={}, dataset_digest="", method_digest="", done=True
    ), Weightless())
    (run.folder / "final").mkdir(exist_ok=True)
    (run.folder / "final" / "config.json").write_text("{}")


async def leave_once_then_train(run: Run, worker: Worker) -> None:
    """Nothing but a 0 in the first life; then slowly, so that whoever is not held back would be there before it opens."""
    if first_time(run, "learner"):
        grant_lineage(run.state_dir)
        return
    await asyncio.sleep(1.0)
    await train(run, worker)


async def hang_up_twice(run: Run, worker: Worker) -> None:
    number = await lead(run, worker)
    os.kill(os.getppid(), signal.SIGHUP)
    while not run.stop_file.exists():
        await asyncio.sleep(0.01)
    os.kill(os.getppid(), signal.SIGHUP)
    await asyncio.sleep(0.5)  # who stops at once would not wait for this
    await close(run, worker, number)


async def kill_the_broker(run: Run, worker: Worker) -> None:
    await lead(run, worker)
    os.kill(int(os.environ["BROKER_PID"]), signal.SIGKILL)
    await idle(run, worker)


# ---------------------------------------------------------------- the others
async def idle(run: Run, worker: Worker) -> None:
    """As a service whose stream is empty."""
    while True:
        await worker.news("work")


async def die(run: Run, worker: Worker) -> None:
    raise RuntimeError("no such luck")


async def be_killed(run: Run, worker: Worker) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def refuse(run: Run, worker: Worker) -> None:
    raise ConfigError("The disk is full.\nMake room.")


async def see_the_end(worker: Worker) -> None:
    while not worker.closed:
        worker.leave_if_asked()
        await worker.broker.news(0.1)


async def examine(run: Run, worker: Worker) -> None:
    await see_the_end(worker)
    await worker.emit("examined", "")


async def die_then_examine(run: Run, worker: Worker) -> None:
    await see_the_end(worker)
    if first_time(run, "evaluator"):
        os.kill(os.getpid(), signal.SIGKILL)
    await examine(run, worker)


async def interrupt_once(run: Run, worker: Worker) -> None:
    """Ctrl-C comes in the middle of an exam that has no end."""
    await see_the_end(worker)
    os.kill(os.getppid(), signal.SIGINT)
    await asyncio.Event().wait()


async def interrupt_twice(run: Run, worker: Worker) -> None:
    await see_the_end(worker)
    os.kill(os.getppid(), signal.SIGINT)
    while not run.stop_file.exists():
        await asyncio.sleep(0.01)
    os.kill(os.getppid(), signal.SIGINT)
    await asyncio.Event().wait()


def first_time(run: Run, what: str) -> bool:
    try:
        (run.folder / f".{what}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


ACTS: Sequence[Callable[..., object]] = (
    train, train_slowly, train_on_and_on, leave_once_then_train, hang_up_twice, kill_the_broker, idle, die, be_killed, refuse,
    examine, die_then_examine, interrupt_once, interrupt_twice,
)


def act(name: str) -> Main:
    """The act of that name; who is asked to leave leaves."""
    chosen = next(act for act in ACTS if act.__name__ == name)

    async def main(run: Run, worker: Worker) -> None:
        playing, asked = asyncio.create_task(chosen(run, worker)), asyncio.create_task(worker.draining.wait())  # type: ignore[arg-type]
        await asyncio.wait([playing, asked] if name in ("idle", "examine") else [playing], return_when=asyncio.FIRST_COMPLETED)
        if not playing.done():
            raise Ended
        playing.result()

    return main


if __name__ == "__main__":
    _, service, folder, instance, name = sys.argv
    sys.exit(serve(lambda: act(name), service, Path(folder), instance))
