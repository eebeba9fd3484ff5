"""Who waits for what, in sentences: the first one names the service that everything waits for."""

from __future__ import annotations

from collections.abc import Sequence

from streamopd.schemas import Heartbeat
from streamopd.stream.broker import Counters

SILENT_S = 10.0   # heartbeats come every second
FORGOTTEN_S = 60.0
STALLED_S = 10.0  # work in hand and no progress for so long is worth a sentence

# downstream first: (groups of this stage, what people call them, who works on them)
STATIONS = (
    ("batched", "groups in closed batches", "learner"),
    ("scored", "scored groups", "packer"),
    ("generated", "rollouts", "teacher"),
    ("issued", "prompts", "generator"),
)


def status_lines(counters: Counters, beats: Sequence[Heartbeat], now_s: float) -> list[str]:
    """Sentences for people, the bottleneck first; `now_s` on the clock of the heartbeats."""
    here = [beat for beat in beats if beat.state != "left"]
    alive = [beat for beat in here if now_s - beat.born_s <= SILENT_S]
    lines = [bottleneck_line(counters, alive, here, now_s)]
    lines += [behind_line(beat, counters.weights_n) for beat in alive if beat.state == "behind"]
    lines += [f"{beat.instance}: no heartbeat for {now_s - beat.born_s:.0f} s" for beat in _missed(here, alive, now_s)]
    lines += [f"{beat.instance} waits for {beat.waits_for}" for beat in alive if beat.state == "waiting" and beat.waits_for]
    return lines


def bottleneck(counters: Counters) -> tuple[str, int, str]:
    """(service, groups in front of it, what they are): who holds everybody up. The feeder when nothing is in flight.

    The packer needs a whole step and no time: it is to blame only when everything in flight lies in front of it.
    """
    inflight = counters.inflight
    if inflight.get("batched"):
        return "learner", inflight["batched"], STATIONS[0][1]
    stage, what, service = max(STATIONS[2:], key=lambda station: inflight.get(station[0], 0))
    if not inflight.get(stage):
        stage, what, service = STATIONS[1]
    return (service, inflight[stage], what) if inflight.get(stage) else ("feeder", 0, "prompts")


def bottleneck_line(counters: Counters, alive: Sequence[Heartbeat], here: Sequence[Heartbeat], now_s: float) -> str:
    """The one sentence that `status` opens with. `here`: all that have not left, the silent ones too."""
    if counters.end == "closed":
        measuring = "; the evaluator looks at the student" if any(beat.service == "evaluator" for beat in alive) else ""
        return f"The run has ended after {counters.steps} steps{measuring}."
    if not counters.boot:
        return "The learner has not opened the stream yet; everything waits for it."
    service, waiting, what = bottleneck(counters)
    workers = [beat for beat in alive if beat.service == service] or [beat for beat in here if beat.service == service]
    if not workers:
        return f"No {service} is alive" + (f", and {waiting} {what} wait for one." if waiting else ".")
    slowest = min(workers, key=moved_s)
    quiet_s = now_s - moved_s(slowest)
    if slowest.state == "starting" and slowest in alive:  # who fell silent then may have worked since
        return f"{slowest.instance} is starting; everything waits for it."
    if waiting and quiet_s > STALLED_S:
        return f"{slowest.instance} is the bottleneck: no progress for {quiet_s:.0f} s while {waiting} {what} wait"
    if waiting:
        return f"{service} is the bottleneck: {waiting} {what} in front of it"
    return f"{service} is the bottleneck: nothing is in flight" + _waits(slowest)


def behind_line(beat: Heartbeat, newest: int) -> str:
    """A replica that could not take new weights, and why."""
    reason = f": {beat.waits_for}" if beat.waits_for else ""
    return f"{beat.instance} is behind: it serves weights {beat.version}, the newest are {newest}{reason}"


def moved_s(beat: Heartbeat) -> float:
    """When its progress last moved, as it says itself; a beat that does not say so counts as movement."""
    return beat.counters.get("moved_s", beat.born_s)


def _missed(here: Sequence[Heartbeat], alive: Sequence[Heartbeat], now_s: float) -> list[Heartbeat]:
    """The silent, but for those gone for long whose work somebody else does."""
    replaced = {beat.service for beat in alive}
    silent = [beat for beat in here if beat not in alive]
    return [beat for beat in silent if beat.service not in replaced or now_s - beat.born_s <= FORGOTTEN_S]


def _waits(beat: Heartbeat) -> str:
    return f", {beat.instance} waits for {beat.waits_for}" if beat.waits_for else ""
