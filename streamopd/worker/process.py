"""One service as a process: event loop, signals, and the one place where anything at all is caught."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

import stamina
import uvloop

from streamopd.errors import Fenced, StreamError, UserError
from streamopd.stream import Broker
from streamopd.watch.metrics import ADDRESS_ENV, show_metrics
from streamopd.worker.gpu import lease_gpu
from streamopd.worker.patient import patient
from streamopd.worker.run import Run
from streamopd.worker.worker import Ended, Worker

Main = Callable[[Run, Worker], Awaitable[None]]
CONNECT_S = 20.0
OPENED_S = 0.2
EXIT_OK, EXIT_FAULT, EXIT_USER = 0, 1, 2
log = logging.getLogger("streamopd")


def small_machine_threads() -> None:
    """One thread a torch process, and no spinning: default threads crawl when several processes share few cores."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def serve(load: Callable[[], Main], service: str, folder: Path, instance: str = "", debug: bool = False) -> int:
    """Run a service until it ends; the exit code tells the truth. `load` may import torch: a device is chosen before."""
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    name = instance or f"{service}-{socket.gethostname()}-{secrets.token_hex(3)}"  # a restarted container has its old host name and pid
    try:
        return uvloop.run(_serve(load, service, folder, name))
    except (UserError, StreamError) as error:
        print(f"{service}: {error}", file=sys.stderr)
        if debug:
            traceback.print_exc()
        return EXIT_USER if isinstance(error, UserError) else EXIT_FAULT
    except KeyboardInterrupt:
        return 130


async def _serve(load: Callable[[], Main], service: str, folder: Path, instance: str) -> int:
    run = Run.open(folder)
    if run.over_file.exists():
        log.warning("the run is over: %s", run.over_file.read_text())
        return EXIT_OK  # whoever starts services again must not start this one for ever
    broker = patient(await _connect(run, service))
    worker = Worker(run, service, f"{instance}-{os.getpid()}", broker)
    broker.leaving = worker.draining.is_set  # type: ignore[attr-defined]
    _listen(worker)
    if ADDRESS_ENV in os.environ:
        show_metrics(os.environ[ADDRESS_ENV], worker.figures)

    async def main(run: Run, worker: Worker) -> None:
        await _until_opened(worker)
        await lease_gpu(worker)
        await load()(run, worker)

    try:
        async with worker:
            return await guarded(main, run, worker)
    finally:
        with contextlib.suppress(Exception):  # it may be gone already
            await broker.close_connection()


async def _until_opened(worker: Worker) -> None:
    """A run that is taken up again is closed until its learner leads. Whoever starts services elsewhere does so once: wait for that."""
    while worker.closed and worker.attended and worker.service not in ("learner", "evaluator"):
        worker.leave_if_asked()
        with worker.waiting("the learner to open the run again"):
            await asyncio.sleep(OPENED_S)


async def _connect(run: Run, service: str) -> Broker:
    """The broker may be starting, as everybody else."""
    async for attempt in stamina.retry_context(on=StreamError, timeout=CONNECT_S, attempts=None, wait_initial=0.2, wait_max=2.0):
        with attempt:
            return await run.connect(service)
    raise AssertionError("a retry ends with a value or an error")


async def guarded(main: Main, run: Run, worker: Worker) -> int:
    """Whatever a service raises ends here, with an event that says so."""
    try:
        await main(run, worker)
        return EXIT_OK
    except Ended:
        return EXIT_OK
    except Fenced as error:
        log.warning("%s", error)
        return EXIT_OK
    except UserError as error:
        await _tell(worker, "refused", str(error))
        raise
    except Exception as error:
        log.exception("%s failed", worker.instance)
        await _tell(worker, "failure", f"{type(error).__name__}: {error}")
        return EXIT_FAULT


async def _tell(worker: Worker, kind: str, text: str) -> None:
    with contextlib.suppress(Exception):
        await worker.emit(kind, text)


def _listen(worker: Worker) -> None:
    """SIGTERM drains; a second one leaves at once."""
    loop = asyncio.get_running_loop()

    def drain() -> None:
        if worker.draining.is_set():
            os._exit(EXIT_FAULT)
        worker.state = "draining"
        worker.draining.set()

    loop.add_signal_handler(signal.SIGTERM, drain)
    loop.add_signal_handler(signal.SIGINT, drain)
