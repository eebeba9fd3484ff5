"""`--in-process`: the same services on one event loop, the stream in memory. One order of events, nothing to kill."""

from __future__ import annotations

import asyncio
import importlib
import signal
import time
from types import ModuleType

from streamopd.errors import StreamopdError
from streamopd.stream import Broker
from streamopd.stream.memory import MemoryBroker, MemoryStore
from streamopd.watch.display import Display
from streamopd.watch.journal import Journal
from streamopd.worker import Ended, Run, Worker

from .outcome import Account, last_metrics, write_outcome

ORDER = ("learner", "feeder", "generator", "teacher", "packer")


def run_in_process(run: Run) -> int:
    """0: completed. 130: stopped by Ctrl-C."""
    return asyncio.run(_run(run))


async def _run(run: Run) -> int:
    started_s = time.time()
    store = MemoryStore()
    account, display = Account(), Display(run.config.name, run.config.learn.max_steps)
    watcher = MemoryBroker(run.limits, store)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, run.stop_file.touch)
    watching = asyncio.create_task(_watch(run, watcher, account, display, started_s))
    services = {name: importlib.import_module(f"streamopd.services.{name}") for name in _names(run)}
    try:
        await asyncio.gather(*(_serve(module, name, run, MemoryBroker(run.limits, store)) for name, module in services.items()))
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        account.note(await watcher.beats())
    status = "stopped" if run.stop_file.exists() else "completed"
    summary, report = write_outcome(run.folder, status, started_s, list(account.lives.values()))
    display.finish(summary, report, "")
    return 130 if status == "stopped" else 0


def _names(run: Run) -> tuple[str, ...]:
    return (*ORDER, "evaluator") if run.config.evaluate.enabled else ORDER


async def _serve(module: ModuleType, service: str, run: Run, broker: Broker) -> None:
    """One service to its end; a failure of one is a failure of the run."""
    async with Worker(run, service, f"{service}-0", broker, inline=True) as worker:
        try:
            await module.main(run, worker)
        except Ended:
            return
        except OSError as error:
            raise StreamopdError(f"{service}: {error}") from error


async def _watch(run: Run, broker: Broker, account: Account, display: Display, started_s: float) -> None:
    """Events to events.jsonl, signs of life to the screen."""
    events, event_id = Journal(run.folder / "events.jsonl"), "0"
    while True:
        counters, beats = await broker.counters(), await broker.beats()
        account.note(beats)
        for newer_id, event in await broker.events(event_id):
            event_id = newer_id
            events.write(event)
            display.event(event)
        display.update(counters, beats, last_metrics(run.folder), time.time() - started_s)
        await asyncio.sleep(0.5)
