"""What a run came to: summary.json and report.html, from what it left in its folder."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import msgspec

from streamopd.learn.checkpoint import load_newest
from streamopd.schemas import Evaluation, Heartbeat
from streamopd.watch import summary as summaries
from streamopd.watch.journal import read
from streamopd.watch.report import write_report

TAIL_BYTES = 1 << 15  # more than one line of metrics


class Account:
    """The last heartbeat of every life of every process: a restarted one counts from zero again."""

    def __init__(self) -> None:
        self.lives: dict[str, Heartbeat] = {}

    def note(self, beats: list[Heartbeat]) -> None:
        self.lives.update({f"{beat.instance}/{beat.pid}": beat for beat in beats})


def shortfall(folder: Path, max_steps: int) -> str:
    """What a run lacks that nobody stopped, as a sentence; "" when it is complete."""
    newest = load_newest(folder / "state")
    if newest is None or not newest.checkpoint.done:
        return f"The learner left no final checkpoint in {folder / 'state'}. Give the same command again to resume."
    if newest.checkpoint.n < max_steps:
        return f"The run ended at step {newest.checkpoint.n} of {max_steps}. Give the same command again to resume."
    if not (folder / "final" / "config.json").is_file():
        return f"{folder / 'final'} holds no model: config.json is not there. Give the same command again to write it."
    return ""


def completed_before(folder: Path, max_steps: int) -> tuple[summaries.Summary, Path] | None:
    """(summary, report) of a run that was completed and has its `max_steps` already; None when there is something to do."""
    file = folder / "summary.json"
    if not max_steps or not file.is_file():
        return None
    try:
        summary = msgspec.json.decode(file.read_bytes(), type=summaries.Summary)
    except msgspec.MsgspecError:  # written by another version
        return None
    if summary.status != "completed" or shortfall(folder, max_steps):
        return None
    report = folder / "report.html"
    return summary, report if report.is_file() else write_report(folder)


def write_outcome(folder: Path, status: str, started_s: float, lives: list[Heartbeat]) -> tuple[summaries.Summary, Path]:
    """Summarise, write summary.json and report.html."""
    metrics = read(folder / "metrics.jsonl")
    newest = load_newest(folder / "state")
    found = newest.checkpoint if newest else None
    first_s = min((line["born_s"] for line in metrics if line["born_s"] >= started_s), default=time.time())
    summary = summaries.summarise(
        status=status,
        metrics=metrics,
        evaluations=[msgspec.convert(line, Evaluation) for line in read(folder / "evaluations.jsonl")],
        fates=found.record if found else {},
        unused=len(found.unused) if found else 0,
        groups_fed=found.fed if found and found.done else len(found.record) if found else 0,
        duplicate_trainings=duplicates(metrics),
        beats=lives,
        wall_s=time.time() - started_s,
        startup_s=first_s - started_s,
    )
    summaries.write(folder / "summary.json", summary)
    return summary, write_report(folder)


def duplicates(metrics: list[dict]) -> int:  # type: ignore[type-arg]
    """Groups that moved the weights more than once, counted from the steps' own lines."""
    times = Counter(seq for line in metrics for seq in line.get("trained", ()))
    return sum(count - 1 for count in times.values())


def last_metrics(folder: Path) -> dict[str, float]:
    """The metrics of the newest step; {} before the first. Reads the end of the file only."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return {}
    with file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - TAIL_BYTES))
        whole = [line for line in lines.read().split(b"\n")[:-1] if line.startswith(b"{")]
    metrics: dict[str, float] = msgspec.json.decode(whole[-1])["metrics"] if whole else {}
    return metrics
