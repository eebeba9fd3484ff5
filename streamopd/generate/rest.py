"""An engine that gives its device's memory back while nobody asks: one GPU is shared by all services of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Sleeper(Protocol):
    """What can rest. Asleep, an engine keeps its weights elsewhere and no caches; it must be awake for anything else."""

    @property
    def inflight(self) -> int: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class Rest:
    """When to sleep: after `after_s` seconds with nothing in flight; 0 is never."""

    def __init__(self, engine: Sleeper, after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.asleep = False
        self._engine, self._after_s, self._clock = engine, after_s, clock
        self._idle_since_s: float | None = None

    @property
    def due(self) -> bool:
        """Whether nobody has asked for long enough; to be looked at every now and then."""
        if self._engine.inflight or self.asleep or not self._after_s:
            self._idle_since_s = None
            return False
        now_s = self._clock()
        self._idle_since_s = now_s if self._idle_since_s is None else self._idle_since_s
        return now_s - self._idle_since_s >= self._after_s

    def sleep(self) -> None:
        self._engine.sleep()
        self.asleep = True

    def wake(self) -> None:
        """Before the engine is asked for anything; nothing happens when it is awake."""
        if self.asleep:
            self._engine.wake()
            self.asleep, self._idle_since_s = False, None
