"""What can be seen of a run: the broker's view, signs of life and events, into the account and onto the screen."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from streamopd.schemas import Event, Heartbeat
from streamopd.stream import Broker, Counters
from streamopd.watch.display import Display
from streamopd.watch.journal import Journal
from streamopd.watch.metrics import ADDRESS_ENV, RunFigures, show_metrics
from streamopd.worker import Run

from .outcome import Account, last_metrics


class Lookout:
    """Looks at one run and tells people."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.account = Account()
        self.display = Display(run.config.name, run.config.learn.max_steps)
        self.events = Journal(run.folder / "events.jsonl")
        self.started_s = time.time()
        self.steps = 0
        self.refused: dict[str, str] = {}  # instance -> why it gave up, as its event says
        self.figures = RunFigures()
        if ADDRESS_ENV in os.environ:
            show_metrics(os.environ[ADDRESS_ENV], self.figures)
        self.heard: Callable[[Event], None] = lambda event: None  # called with each new event
        self._event_id = "0"
        self._unwritten = ""  # why events are not written down, once that is so

    async def look(self, broker: Broker) -> tuple[Counters, list[Heartbeat]]:
        """One look at everything; StreamError when the broker does not answer."""
        counters, beats = await broker.counters(), await broker.beats()
        self.account.note(beats)
        async for event in self._new_events(broker):
            if event.kind == "refused":
                self.refused[event.source] = event.text
            self.heard(event)
            self.tell(event)
        self.steps = max(self.steps, counters.steps)
        learned = last_metrics(self.run.folder)
        self.figures.counters, self.figures.learned = counters, learned
        self.display.update(counters, beats, learned, time.time() - self.started_s)
        return counters, beats

    async def skip_old_events(self, broker: Broker) -> None:
        """Those of lives before are in events.jsonl already."""
        async for _ in self._new_events(broker):
            pass

    async def _new_events(self, broker: Broker) -> AsyncIterator[Event]:
        while page := await broker.events(self._event_id):
            for event_id, event in page:
                self._event_id = event_id
                yield event

    def say(self, kind: str, source: str, text: str) -> None:
        """An event of this process's own."""
        self.tell(Event(kind=kind, source=source, born_s=time.time(), text=text))

    def tell(self, event: Event) -> None:
        """To people and into events.jsonl. A full disk stops the services, who can say what they need; not those who watch."""
        self.display.event(event)
        try:
            self.events.write(event)
        except OSError as error:
            if not self._unwritten:
                self._unwritten = f"{self.events.path} is not written any more: {error}"
                self.display.event(Event(kind="warning", source="supervisor", born_s=time.time(), text=self._unwritten))

    def go_silent(self) -> None:
        """The terminal went away: a write to it would be an error."""
        with suppress(OSError):
            self.display.stop()
        self.display.out = open(os.devnull, "w")  # noqa: SIM115  until this process ends
