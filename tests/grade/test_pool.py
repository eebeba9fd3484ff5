from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from streamopd.errors import ConfigError, UserError
from streamopd.grade.pool import GradingPool, Item
from streamopd.schemas import Outcome
from tests.grade.asked import asked

# Breaks as the answer says; what it says of itself comes back as feedback.
BREAKER = """
import os, signal, sys, time
from streamopd.schemas import Outcome

def grade(prompt, text, stopped):
    if text == "hang":
        time.sleep(3600)
    if text == "hang in C":
        sum(range(1 << 60))
    if text == "crash":
        os._exit(3)
    if text == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "raise":
        raise KeyError("x")
    if text == "exit":
        sys.exit(1)
    return Outcome(reward=float(len(text)), feedback=f"{os.getpid()} {'torch' in sys.modules}")
"""


@pytest.fixture
def breaker(tmp_path: Path) -> str:
    (tmp_path / "breaker.py").write_text(BREAKER)
    return f"{tmp_path / 'breaker.py'}:grade"


@asynccontextmanager
async def opened(grader: str, timeout_s: float = 60.0, workers: int = 1) -> AsyncIterator[GradingPool]:
    pool = GradingPool(grader, timeout_s, workers)
    try:
        yield pool
    finally:
        pool.close()


def answers(*texts: str) -> list[Item]:
    return [(asked(seq=seq), text, True) for seq, text in enumerate(texts)]


def rewards(verdicts: list[Outcome | None]) -> list[float | None]:
    return [outcome and outcome.reward for outcome in verdicts]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_verdicts_come_in_the_order_of_the_answers(breaker: str, workers: int) -> None:
    async def grade() -> list[list[float | None]]:
        async with opened(breaker, workers=workers) as pool:
            return [rewards(await pool.grade(answers(*texts))) for texts in (("a", "bb", "ccc", "dddd", "eeeee"), (), ("ff",))]

    assert asyncio.run(grade()) == [[1, 2, 3, 4, 5], [], [2]]


def test_a_process_of_its_own_grades_and_never_loads_torch(breaker: str) -> None:
    import torch  # noqa: F401  (here it is loaded, so a fork would have it)

    async def grade() -> list[Outcome | None]:
        async with opened(breaker) as pool:
            return await pool.grade(answers("a"))

    (outcome,) = asyncio.run(grade())
    assert outcome is not None
    pid, with_torch = outcome.feedback.split()
    assert int(pid) != os.getpid()
    assert with_torch == "False"


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("raise", "gave no verdict on p2: KeyError: 'x'"),
        ("crash", "gave no verdict on p2: its process died"),
        ("killed", "gave no verdict on p2: its process died"),
    ],
)
def test_a_grader_that_breaks_on_one_answer_costs_that_verdict_only(breaker: str, broken: str, problem: str) -> None:
    async def grade() -> tuple[list[float | None], str, list[float | None]]:
        async with opened(breaker) as pool:
            verdicts = rewards(await pool.grade(answers("a", "bb", broken, "ccc")))
            return verdicts, pool.last_problem, rewards(await pool.grade(answers("dddd")))

    verdicts, said, later = asyncio.run(grade())
    assert verdicts == [1, 2, None, 3]
    assert problem in said
    assert later == [4]


@pytest.mark.parametrize("broken", ["hang", "hang in C"])
def test_a_grader_that_hangs_is_ended_and_the_others_are_graded(breaker: str, broken: str) -> None:
    async def grade() -> tuple[list[float | None], str]:
        async with opened(breaker, timeout_s=0.5) as pool:
            return rewards(await pool.grade(answers("a", broken, "bb"))), pool.last_problem

    verdicts, said = asyncio.run(grade())
    assert verdicts == [1, None, 2]
    assert "gave no verdict on p1: it was still busy after 0.5 s" in said


def test_of_two_workers_the_innocent_one_loses_nothing(breaker: str) -> None:
    async def grade() -> list[float | None]:
        async with opened(breaker, workers=2) as pool:
            return rewards(await pool.grade(answers("a", "crash", "bb", "ccc")))

    assert asyncio.run(grade()) == [1, None, 2, 3]


def test_a_process_that_dies_between_two_batches_is_replaced_and_convicts_nobody(breaker: str) -> None:
    async def grade() -> tuple[list[float | None], str]:
        async with opened(breaker) as pool:
            (outcome,) = await pool.grade(answers("a"))
            assert outcome is not None
            os.kill(int(outcome.feedback.split()[0]), signal.SIGKILL)
            return rewards(await pool.grade(answers("bb", "ccc"))), pool.last_problem

    assert asyncio.run(grade()) == ([2, 3], "")


def test_calls_that_overlap_do_not_take_the_blame_for_each_other(breaker: str) -> None:
    async def grade() -> list[list[float | None]]:
        async with opened(breaker) as pool:
            batches = [answers("a", "crash"), answers("bb"), answers("crash", "ccc")]
            return [rewards(verdicts) for verdicts in await asyncio.gather(*(pool.grade(batch) for batch in batches))]

    assert asyncio.run(grade()) == [[1, None], [2], [None, 3]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_library_grader_says_the_same_inside_and_outside(workers: int) -> None:
    async def grade() -> tuple[list[float | None], str]:
        async with opened("chain-sum", workers=workers) as pool:
            items = [(asked(), "3", True), (asked(), "4", True), (asked(solution=None, seq=2), "3", True)]
            return rewards(await pool.grade(items)), pool.last_problem

    verdicts, said = asyncio.run(grade())
    assert verdicts == [1, 0, None]
    assert "chain-sum gave no verdict on p2: UserError: p2 has no solution" in said


def test_no_grader_needs_no_process() -> None:
    async def grade() -> tuple[list[Outcome | None], int]:
        async with opened("none") as pool:
            return await pool.grade(answers("a", "b")), pool.workers

    assert asyncio.run(grade()) == ([None, None], 0)


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda folder: "chain-sums", ConfigError, "Did you mean 'chain-sum'?"),
        (lambda folder: f"{folder / 'gone.py'}:grade", ConfigError, "names a file that is not there"),
        (lambda folder: f"{folder / 'broken.py'}:grade", UserError, "cannot be loaded: ZeroDivisionError"),
        (lambda folder: f"{folder / 'deadly.py'}:grade", UserError, "cannot be loaded: BrokenProcessPool"),
    ],
)
def test_a_grader_that_cannot_be_loaded_is_refused_at_the_first_batch(
    tmp_path: Path, make: Callable[[Path], str], error: type[UserError], sentence: str
) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "deadly.py").write_text("import os; os._exit(1)")

    async def grade() -> None:
        async with opened(make(tmp_path)) as pool:
            await pool.grade(answers("a"))

    with pytest.raises(error) as refusal:
        asyncio.run(grade())
    assert sentence in str(refusal.value)


PARENT = """
import asyncio, sys
from streamopd.grade.pool import GradingPool
from tests.grade.asked import asked

async def main():
    pool = GradingPool(sys.argv[1], 3600.0)
    (outcome,) = await pool.grade([(asked(), "a", True)])
    print(outcome.feedback.split()[0], flush=True)
    await pool.grade([(asked(), "hang", True)])

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_child_leaves_with_a_parent_that_is_killed(tmp_path: Path, breaker: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, str(script), breaker], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    assert int(parent.stdout.readline()) != parent.pid
    parent.kill()
    assert parent.stdout.read() == ""  # the pipe ends when its last holder has left: without the rule, in an hour
    parent.wait()
    parent.stdout.close()
