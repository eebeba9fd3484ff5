"""Grading in processes of their own: a grader that hangs, crashes or raises costs its item a verdict, and nothing else."""

from __future__ import annotations

import asyncio
import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache

import msgspec

from streamopd.errors import UserError
from streamopd.schemas import Outcome, Prompt

from .graders import Grader, load

Item = tuple[Prompt, str, bool]  # the prompt, the text of the answer, whether it ended by itself
Verdicts = list[Outcome | None]

LOAD_S = 120.0  # a grader's libraries may take long to import on a busy machine

_encoder = msgspec.msgpack.Encoder()
_items = msgspec.msgpack.Decoder(list[Item])
_verdicts = msgspec.msgpack.Decoder(Verdicts)


class GradingPool:
    """Grades batches. Items go together first; when that fails, each goes alone, so that only the guilty one pays."""

    def __init__(self, grader_name: str, timeout_s: float, workers: int = 1) -> None:
        """`timeout_s` is for one answer. No worker (or the grader "none"): in this process, and without a time limit."""
        self.grader_name = grader_name
        self.timeout_s = timeout_s
        self.workers = 0 if grader_name == "none" else workers
        self.last_problem = ""      # in words, of the last item without a verdict; whoever reads it may empty it
        self._turn = asyncio.Lock()  # an item that goes alone must be alone
        self._grader: Grader | None = None
        if self.workers:
            self._hire()
        else:
            self._grader = load(grader_name)

    async def grade(self, items: Sequence[Item]) -> Verdicts:
        """One verdict an item, in order; None where there is none. UserError when the grader cannot be loaded."""
        async with self._turn:
            if self.workers:
                await self._until_loaded()
            parts = _split(items, max(1, self.workers))
            tried = await asyncio.gather(*(self._judge(part) for part in parts), return_exceptions=True)
            if any(isinstance(result, BrokenProcessPool) for result in tried):
                self._replace()
            verdicts: Verdicts = []
            for part, result in zip(parts, tried, strict=True):
                verdicts += [await self._grade_alone(item) for item in part] if isinstance(result, BaseException) else result
            return verdicts

    def close(self) -> None:
        """End the processes; waits for an answer that is being graded, at most `timeout_s`."""
        if self.workers:
            self._executor.shutdown(wait=True, cancel_futures=True)

    async def _grade_alone(self, item: Item) -> Outcome | None:
        if self.workers:
            await self._until_loaded()  # a new process's start is not the item's time
        start_s = time.monotonic()
        (result,) = await asyncio.gather(self._judge([item]), return_exceptions=True)
        if not isinstance(result, BaseException):
            return result[0]
        self.last_problem = f"The grader {self.grader_name} gave no verdict on {item[0].id}: " + (
            self._cause_of_death(time.monotonic() - start_s)
            if isinstance(result, BrokenProcessPool)
            else f"{type(result).__name__}: {result}"
        )
        if isinstance(result, BrokenProcessPool):
            self._replace()
        return None

    def _cause_of_death(self, lived_s: float) -> str:
        if lived_s >= self.timeout_s:
            return f"it was still busy after {self.timeout_s:g} s. Raise generator.grade_timeout_s, or mend the grader."
        return "its process died. The log says where; mend the grader."

    async def _judge(self, items: Sequence[Item]) -> Verdicts:
        if self._grader is not None:
            return [self._grader(*item) for item in items]
        job: Future[bytes] = self._executor.submit(grade_batch, self.grader_name, self.timeout_s, _encoder.encode(items))
        body: bytes = await asyncio.wrap_future(job)
        return _verdicts.decode(body)

    # ---------------------------------------------------------------- the processes
    def _hire(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # never a fork of a process that holds torch's threads
        self._executor = ProcessPoolExecutor(self.workers, mp_context=spawn, initializer=settle_in)
        self._loading: Future[None] = self._executor.submit(load_grader, self.grader_name)

    def _replace(self) -> None:
        """After one has died: the others too, and nobody waits for them. An executor that is broken can wait for a worker for ever."""
        for child in multiprocessing.active_children():
            child.kill()
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._hire()

    async def _until_loaded(self) -> None:
        (error,) = await asyncio.gather(asyncio.wrap_future(self._loading), return_exceptions=True)
        if isinstance(error, UserError):
            raise error
        if error is not None:
            raise UserError(
                f"The grader {self.grader_name} cannot be loaded: {type(error).__name__}: {error} Mend it, or set data.grader."
            ) from error


def _split(items: Sequence[Item], parts: int) -> list[Sequence[Item]]:
    """At most `parts` runs of neighbours, as even as can be."""
    size = -(-len(items) // parts)
    return [items[start : start + size] for start in range(0, len(items), size)] if items else []


# ---------------------------------------------------------------- inside a child, which never imports torch
def settle_in() -> None:
    """A child leaves with its parent, however that ends, and not at a terminal's Ctrl-C, which the parent answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def load_grader(name: str) -> None:
    with _time_limit(LOAD_S):
        _loaded(name)


def grade_batch(name: str, timeout_s: float, body: bytes) -> bytes:
    """Verdicts of the items in `body`, each within `timeout_s`; what a grader raises goes to the parent."""
    grader = _loaded(name)
    verdicts: Verdicts = []
    with _time_limit(timeout_s) as restart:
        for item in _items.decode(body):
            restart()
            verdicts.append(grader(*item))
    return _encoder.encode(verdicts)


@lru_cache(maxsize=1)
def _loaded(name: str) -> Grader:
    return load(name)


@contextmanager
def _time_limit(seconds: float) -> Iterator[Callable[[], None]]:
    """Past it the process writes where it hangs to stderr and exits, even from inside a C call that holds the GIL.

    Gives a function that starts the clock anew, at most eight times in `seconds`: each start is a thread.
    """
    due_s = 0.0

    def restart() -> None:
        nonlocal due_s
        if time.monotonic() > due_s:
            faulthandler.dump_traceback_later(seconds, exit=True)
            due_s = time.monotonic() + seconds / 8

    restart()
    try:
        yield restart
    finally:
        faulthandler.cancel_dump_traceback_later()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
