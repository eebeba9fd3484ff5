"""What a person sees while a run goes on: a live panel on a terminal, a plain line every few seconds anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from streamopd.schemas import Event, Heartbeat
from streamopd.stream.broker import Counters
from streamopd.watch.journal import read
from streamopd.watch.status import status_lines
from streamopd.watch.summary import KL_HELDOUT, Compared, Summary

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

Sample = Mapping[str, str]  # {"prompt", "completion", "correct"} of an Evaluation

PLAIN_EVERY_S = 5.0
SHOWN_METRICS = ("loss", "kl", "kl_bound", "accuracy", "age_mean")
QUIET_EVENTS = ("join", "leave", "swap", "drill")
HEADLINES = ("accuracy_greedy", "accuracy_sampled", KL_HELDOUT)  # with their figures a style


class Display:
    """Fed by `update` as often as one likes; `finish` once."""

    def __init__(self, name: str, max_steps: int, out: TextIO | None = None) -> None:
        self.name = name
        self.max_steps = max_steps  # 0: until the data ends
        self.out = out or sys.stdout
        self.live: Live | None = None
        self._plain_s = -PLAIN_EVERY_S

    def update(
        self, counters: Counters, beats: Sequence[Heartbeat], last_step: Mapping[str, float], elapsed_s: float
    ) -> None:
        """Show where the run is; `last_step` holds the metrics of the newest step, {} before the first."""
        if self.out.isatty():
            self._refresh(counters, beats, last_step, elapsed_s)
        elif elapsed_s - self._plain_s >= PLAIN_EVERY_S:
            self._plain_s = elapsed_s
            self._say(plain_line(self.max_steps, counters, beats, last_step, elapsed_s))

    def event(self, event: Event) -> None:
        """What happened, as one sentence that stays on the screen; small news only goes to the journal."""
        if event.kind in QUIET_EVENTS:
            return
        text = f"{event.kind}: {_one_line(event.text, 200)}"
        if self.live:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            self._say(text)

    def finish(self, summary: Summary, report: Path, failure: str = "") -> None:
        """The end: figures before and after, a few answers, where the report is, what to try next.

        The run folder is the report's. A run that failed is told by its caller, not praised here.
        """
        self.stop()
        for line in closing_lines(summary, report, answers_before_and_after(report.parent), failed=bool(failure)):
            self._say(line)

    def stop(self) -> None:
        """Leave the terminal as it was; the last panel stays."""
        if self.live:
            self.live.stop()
            self.live = None

    def _say(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def _refresh(
        self, counters: Counters, beats: Sequence[Heartbeat], last_step: Mapping[str, float], elapsed_s: float
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        shown = panel(self.name, self.max_steps, counters, beats, last_step, elapsed_s)
        if self.live is None:
            self.live = Live(shown, console=Console(file=self.out), auto_refresh=False)
            self.live.start()
        self.live.update(shown, refresh=True)


def strip(counters: Counters, max_steps: int) -> str:
    """The journey with how many groups lie at each station."""
    at = counters.inflight
    goal = f"/{max_steps}" if max_steps else ""
    return (
        f"prompts {at.get('issued', 0)} ▸ rollouts {at.get('generated', 0)} ▸ scored {at.get('scored', 0)} "
        f"▸ batches {at.get('batched', 0)} ▸ step {counters.steps}{goal}"
    )


def figures(last_step: Mapping[str, float]) -> str:
    """The newest step's metrics that people follow."""
    return "  ".join(f"{name} {number(last_step[name])}" for name in SHOWN_METRICS if name in last_step)


def plain_line(
    max_steps: int, counters: Counters, beats: Sequence[Heartbeat], last_step: Mapping[str, float], elapsed_s: float
) -> str:
    """Everything in one line without any control character."""
    who = status_lines(counters, beats, time.time())[0]
    parts = [f"{elapsed_s:6.0f} s", strip(counters, max_steps), figures(last_step), who]
    return "  |  ".join(part for part in parts if part)


def panel(
    name: str,
    max_steps: int,
    counters: Counters,
    beats: Sequence[Heartbeat],
    last_step: Mapping[str, float],
    elapsed_s: float,
) -> RenderableType:
    """The live view: strip, progress, figures, and who waits for what."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    lines: list[RenderableType] = [Text(strip(counters, max_steps), style="bold")]
    if max_steps:
        lines.append(progress_bar(counters.steps / max_steps))
    lines += [Text(figures(last_step) or "no step yet"), Text("")]
    first, *others = status_lines(counters, beats, time.time())
    lines += [Text(first, style="yellow"), *(Text(line, style="dim") for line in others)]
    return Panel(Group(*lines), title=f"{name}, {elapsed_s:.0f} s", title_align="left")


def progress_bar(done: float, width: int = 60) -> RenderableType:
    """A bar of characters: it keeps its place in a column of text."""
    from rich.text import Text

    filled = round(min(done, 1.0) * width)
    return Text.assemble(("━" * filled, "green"), ("━" * (width - filled), "bright_black"), f" {done:.0%}")


def closing_lines(summary: Summary, report: Path, answers: Sequence[tuple[Sample, Sample]], failed: bool) -> list[str]:
    """What is left on the screen when the run is over."""
    lines = ["", f"{summary.status}: {summary.steps} steps, {account(summary)}, {summary.wall_s:.0f} s", ""]
    lines += comparison_lines(summary.eval)
    for before, after in answers:
        lines += ["", f"  {_one_line(before['prompt'])}", f"    before  {_answer(before)}", f"    after   {_answer(after)}"]
    lines += ["", f"Report   {report}"]
    return lines if failed else lines + next_steps(report.parent)


def next_steps(folder: Path) -> list[str]:
    """What to try next."""
    return [
        f"Student  {folder / 'final'} (a Hugging Face folder)",
        "Next     -s max_staleness=0 runs the same processes in turn: compare wall_s in the two summary.json",
        "         -s method=default tries another method; `streamopd methods` lists them",
    ]


def answers_before_and_after(folder: Path) -> list[tuple[Sample, Sample]]:
    """The shown held-out answers of the first and of the last evaluation of the student, by prompt."""
    found = [line for line in read(folder / "evaluations.jsonl") if line["who"] == "student"]
    if len({line["n"] for line in found}) < 2:
        return []
    first, last = min(found, key=lambda line: line["n"]), max(found, key=lambda line: line["n"])
    after = {sample["prompt"]: sample for sample in last.get("samples", ())}
    return [(sample, after[sample["prompt"]]) for sample in first.get("samples", ()) if sample["prompt"] in after]


def account(summary: Summary) -> str:
    """Where every group went, in words."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in summary.groups_dropped.items() if count)
    return f"{summary.groups_trained} of {summary.groups_fed} groups trained" + (f" ({dropped})" if dropped else "")


def comparison_lines(compared: Mapping[str, Compared]) -> list[str]:
    """A small table: metric, before → after, and the teacher beside them."""
    names = [name for headline in HEADLINES for name in compared if name.partition("/")[0] == headline]
    if not names:
        return ["  (nothing was evaluated)"]
    width = max(map(len, names))
    return [f"  {name:<{width}}  {_compare(compared[name])}" for name in names]


def number(value: float | None) -> str:
    """Three significant digits, whole numbers whole; "–" for what nobody measured."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _compare(of: Compared) -> str:
    teacher = f"   teacher {number(of.teacher)}" if of.teacher is not None else ""
    return f"{number(of.before)} → {number(of.after)}{teacher}"


def _answer(sample: Sample) -> str:
    mark = {"yes": " ✓", "no": " ✗"}.get(sample.get("correct", ""), "")
    return _one_line(sample["completion"]) + mark


def _one_line(text: str, width: int = 90) -> str:
    """Model text on one line of a terminal: control characters out, cut where it gets long."""
    flat = "".join(c if c.isprintable() else " " for c in text)
    return flat if len(flat) <= width else flat[: width - 1] + "…"
