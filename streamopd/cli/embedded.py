"""The embedded broker under the supervisor: started with the run, again when it dies, and ended with it."""

from __future__ import annotations

import signal
import time

import msgspec

from streamopd.errors import StreamError, StreamopdError
from streamopd.stream.server import Server, start_server
from streamopd.worker import Run
from streamopd.worker.run import BrokerAddress, write_whole

from .child import Deaths, tied


class EmbeddedBroker:
    """A run's own server. A run with `redis.url` has none, and nothing here does anything."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.folder = run.state_dir / "broker"
        self.server: Server | None = None
        self.deaths = Deaths()
        self.start_after_s = 0.0  # time.monotonic()
        self.problem = ""         # with the last start

    def start(self) -> None:
        """New, or again on its folder: everything acknowledged is there. StreamError with its last words otherwise.

        To be called in the main thread, although it waits: the server ends with the thread that started it.
        """
        if self.run.config.redis.url:
            return
        self.server = start_server(self.folder, tied(signal.SIGTERM))
        address = BrokerAddress(url=self.server.url, password=self.server.password)
        write_whole(self.run.state_dir / "broker.json", msgspec.json.encode(address))

    def tend(self, steps: int) -> bool:
        """Whether it had died and was started again; the services wait for it meanwhile. `steps` of the run so far.

        StreamError when this start failed, StreamopdError when there were too many.
        """
        now_s = time.monotonic()
        if self.server is None or self.server.running() or now_s < self.start_after_s:
            return False
        self.deaths.note(steps, worked=True, now_s=now_s)
        if self.deaths.too_many:
            raise StreamopdError(f"The embedded broker on {self.folder} died {self.deaths.too_many}. {self.problem}")
        self.start_after_s = now_s + self.deaths.pause_s
        try:
            self.start()
        except (StreamError, OSError) as error:
            self.problem = str(error)
            raise StreamError(f"The embedded broker on {self.folder} could not be started again. {error}") from error
        return True

    def stop(self) -> None:
        if self.server:
            self.server.stop()
