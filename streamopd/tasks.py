"""Ending asyncio tasks, whatever lies between a cancellation and its task."""

from __future__ import annotations

import asyncio
from typing import Any

AGAIN_S = 1.0  # long enough for a cleanup


async def cancel_until_done(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for their end. A client library that connects at that moment can lose a cancellation, so it is repeated."""
    waiting = {task for task in tasks if not task.done()}
    while waiting:
        for task in waiting:
            task.cancel()
        _, waiting = await asyncio.wait(waiting, timeout=AGAIN_S)
