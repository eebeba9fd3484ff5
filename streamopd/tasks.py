"""Ending asyncio tasks, whatever lies between a cancellation and its task."""

from __future__ import annotations

import asyncio
import logging
from itertools import count
from typing import Any

log = logging.getLogger("streamopd")
AGAIN_S = 1.0  # long enough for a cleanup


async def cancel_until_done(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for their end; what they raise is dropped. A client library that connects at that moment can lose a
    cancellation, so it is repeated, and cuts a cleanup short that takes longer than AGAIN_S."""
    waiting = {task for task in tasks if not task.done()}
    for times in count(1):
        if not waiting:
            break
        if times % 10 == 0:
            log.warning("cancelled %d times, and still there: %s", times, ", ".join(map(str, waiting)))
        for task in waiting:
            task.cancel()
        _, waiting = await asyncio.wait(waiting, timeout=AGAIN_S)
    for task in tasks:
        if not task.cancelled():
            task.exception()
