"""A broker client that waits for its broker. Every script may be repeated, so an unanswered call is simply made again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import stamina

from streamopd.errors import StreamError
from streamopd.stream import Broker


class PatientBroker:
    """Any Broker; a StreamError is retried with back-off and jitter until `patience_s` have passed, then raised.

    Who is `leaving` does not wait: there is nothing to wait for.
    """

    def __init__(self, broker: Broker, patience_s: float) -> None:
        self._broker = broker
        self._patience_s = patience_s
        self.leaving: Callable[[], bool] = lambda: False
        self.faults = 0  # unanswered calls so far: whoever sees it move reads its own pending entries first

    def __getattr__(self, name: str) -> Any:
        target = getattr(self._broker, name)
        if not inspect.iscoroutinefunction(target):
            return target

        async def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return await target(*args, **kwargs)
            except StreamError:
                self.faults += 1
            async for attempt in stamina.retry_context(
                on=self._worth_it, timeout=self._patience_s, attempts=None, wait_initial=0.1, wait_max=2.0, wait_jitter=0.1
            ):
                with attempt:
                    return await target(*args, **kwargs)

        return call

    def _worth_it(self, error: Exception) -> bool:
        return isinstance(error, StreamError) and not self.leaving()


PATIENCE_S = 120.0


def patient(broker: Broker, patience_s: float = PATIENCE_S) -> Broker:
    """`broker`, patient."""
    return cast(Broker, PatientBroker(broker, patience_s))
