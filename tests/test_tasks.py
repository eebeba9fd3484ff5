"""Tasks end when they are told to, however many times it takes."""

from __future__ import annotations

import asyncio

import pytest

from streamopd import tasks
from streamopd.tasks import cancel_until_done

pytestmark = pytest.mark.anyio


async def deaf(times: int) -> None:
    for _ in range(times + 1):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            heard = asyncio.current_task()
            assert heard
            if heard.cancelling() > times:
                raise


async def failing() -> None:
    raise RuntimeError("no such luck")


async def test_a_cancellation_that_was_lost_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "AGAIN_S", 0.01)
    started = [asyncio.create_task(deaf(times)) for times in (0, 1, 3)]
    await asyncio.sleep(0)
    await cancel_until_done(*started)
    assert all(task.cancelled() for task in started)


async def test_a_task_that_has_ended_is_left_as_it_is() -> None:
    task = asyncio.create_task(failing())
    await asyncio.wait([task])
    await cancel_until_done(task)
    assert isinstance(task.exception(), RuntimeError)
    await cancel_until_done()
