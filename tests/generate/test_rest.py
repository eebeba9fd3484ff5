"""An idle engine sleeps, and is awake before anybody asks it for anything."""

from __future__ import annotations

import pytest

from streamopd.generate.rest import Rest


class Engine:
    """It says what was done to it, and cannot sleep with anything in flight."""

    def __init__(self) -> None:
        self.inflight, self.done = 0, list[str]()

    def sleep(self) -> None:
        assert not self.inflight
        self.done.append("sleep")

    def wake(self) -> None:
        self.done.append("wake")


@pytest.fixture
def now() -> list[float]:
    return [100.0]


def test_it_sleeps_after_so_long_without_anything_in_flight(now: list[float]) -> None:
    engine = Engine()
    rest = Rest(engine, 5.0, lambda: now[0])
    assert not rest.due
    now[0] += 4.9
    assert not rest.due
    engine.inflight = 1
    now[0] += 1
    assert not rest.due, "somebody is being answered"
    engine.inflight = 0
    assert not rest.due, "the clock starts again"
    now[0] += 5
    assert rest.due
    rest.sleep()
    assert rest.asleep
    assert not rest.due
    rest.wake()
    rest.wake()
    assert engine.done == ["sleep", "wake"]
    now[0] += 100
    assert not rest.due, "idle since it woke, not since before"


def test_zero_is_never(now: list[float]) -> None:
    rest = Rest(Engine(), 0.0, lambda: now[0])
    for _ in range(3):
        now[0] += 1e6
        assert not rest.due
