"""report.html: a run on one page that needs nothing else. Model text is data here: it is escaped, always."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from streamopd import config as configs
from streamopd.config import Config
from streamopd.schemas import Evaluation
from streamopd.watch import chart, summary
from streamopd.watch.display import answers_before_and_after, number
from streamopd.watch.journal import read, write_atomically
from streamopd.watch.style import CSS
from streamopd.watch.summary import Compared, Summary, add_histograms, compare, idle_fraction, teacher_figures

HEADLINES = {
    "accuracy_greedy": "held-out accuracy, greedy",
    "accuracy_sampled": "held-out accuracy, sampled",
    summary.KL_HELDOUT: "held-out KL(teacher‖student), nats a token",
}
LENGTH_BIN = 4  # of StepDone's length histograms
MOST_EVENTS = 200
EVERYDAY_EVENTS = ("swap",)
Lines = Sequence[Mapping[str, Any]]


def write_report(run_folder: str | Path) -> Path:
    """Write report.html into the run folder from what lies there; a run that still goes on gives a page so far."""
    folder = Path(run_folder)
    metrics, events = read(folder / "metrics.jsonl"), read(folder / "events.jsonl")
    evaluations = [msgspec.convert(line, Evaluation) for line in read(folder / "evaluations.jsonl")]
    config = _config(folder / "config.json")
    account = summary.read(folder / "summary.json") if (folder / "summary.json").is_file() else None
    sections = [
        _headline(config.name if config else folder.name, account, metrics),
        _tiles(account, evaluations),
        _charts(metrics, evaluations, events, config),
        _section("Held-out figures", _figures_table(compare(evaluations))),
        _section("A few answers, before and after", _answers_table(folder, evaluations)),
        _section("The account", _account_table(account)),
        _section("What happened", _events_table(events)),
        _section("Settings that are not the default", _settings_table(config)),
    ]
    file = folder / "report.html"
    write_atomically(file, _page(config.name if config else folder.name, sections).encode())
    return file


# ---------------------------------------------------------------- the opening
def _headline(name: str, account: Summary | None, metrics: Lines) -> str:
    steps = max((line["n"] for line in metrics), default=0)
    if account is None:
        return f"<header><h1>{escape(name)}</h1><p>{steps} steps so far; no summary.json yet.</p></header>"
    told = (
        f"{account.status} after {account.steps:,} steps: {account.groups_trained:,} of {account.groups_fed:,} groups trained "
        f"in {account.wall_s:,.0f} s, {account.startup_s:.0f} s of them before the first step."
    )
    return f"<header><h1>{escape(name)}</h1><p>{escape(told)}</p></header>"


def _tiles(account: Summary | None, evaluations: Sequence[Evaluation]) -> str:
    """The handful of numbers that a person looks for first."""
    found = compare(evaluations)
    tiles = [
        _tile(words, f"{number(of.before)} → {number(of.after)}", "" if of.teacher is None else f"teacher {number(of.teacher)}")
        for name, words in HEADLINES.items()
        if (of := found.get(name))
    ]
    if account:
        age, swaps = account.age_steps, account.swaps
        tiles += [
            _tile("age of trained tokens, steps", number(age.mean), f"95 % within {number(age.p95)}, oldest {number(age.max)}"),
            _tile("weight swaps", f"{swaps.count:,}", f"{swaps.in_flight:,} with answers in flight"),
            _tile("learner waiting", f"{account.learner_idle_fraction:.0%}", f"{account.tokens_trained:,} tokens trained"),
        ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(words: str, value: str, below: str) -> str:
    return f'<div class="tile"><span>{escape(words)}</span><strong>{escape(value)}</strong><small>{escape(below)}</small></div>'


# ---------------------------------------------------------------- charts
def _charts(metrics: Lines, evaluations: Sequence[Evaluation], events: Lines, config: Config | None) -> str:
    drawn = [
        _distance_chart(metrics),
        _accuracy_chart(metrics, evaluations),
        _age_chart(metrics, config),
        _length_chart(metrics),
        _throughput_chart(metrics),
        chart.share_chart("Who waited", idle_shares(metrics, events), "share of its time spent waiting"),
    ]
    return '<div class="charts">' + "".join(f"<figure>{svg}</figure>" for svg in drawn) + "</div>"


def _distance_chart(metrics: Lines) -> str:
    """What the method minimises, beside the one divergence that is watched whatever the method."""
    lines = [
        chart.Line("loss", _curve(metrics, "loss")),
        chart.Line("KL(student‖teacher)", _curve(metrics, "kl")),
        chart.Line("lower bound of KL(student‖teacher)", _curve(metrics, "kl_bound")),
    ]
    return chart.line_chart("Distance from the teacher", lines, "step", "nats a token")


def _accuracy_chart(metrics: Lines, evaluations: Sequence[Evaluation]) -> str:
    trained = chart.smooth(_curve(metrics, "accuracy"), 10)
    heldout = {e.n: e.metrics["accuracy_greedy"] for e in evaluations if e.who == "student" and "accuracy_greedy" in e.metrics}
    last = max([line["n"] for line in metrics] + list(heldout), default=0)
    teacher = teacher_figures(evaluations).get("accuracy_greedy")
    level = [(0.0, teacher), (float(last), teacher)] if teacher is not None else []
    lines = [
        chart.Line("trained answers, mean of 10 steps", trained),
        chart.Line("held out, greedy", sorted(heldout.items()), "dots"),
        chart.Line("teacher, greedy", level, "dashed"),
    ]
    return chart.line_chart("Accuracy", lines, "step", "share correct", y_high=1.0)


def _age_chart(metrics: Lines, config: Config | None) -> str:
    ages = add_histograms(line.get("age_steps", {}) for line in metrics)
    cap = [("age cap", config.max_age_steps + 0.5)] if config else []
    words = "steps between writing and training"
    return chart.bar_chart("Age of trained tokens", {"tokens": ages}, words, "tokens", marks=cap)


def _length_chart(metrics: Lines) -> str:
    lengths = {
        name: add_histograms(line.get(key, {}) for line in metrics)
        for name, key in (("trained", "trained_lengths"), ("dropped", "dropped_lengths"))
    }
    return chart.bar_chart("Length of answers", lengths, "tokens", "answers", bin_width=LENGTH_BIN)


def _throughput_chart(metrics: Lines) -> str:
    """Tokens trained a second since the first step, over stretches of equal length."""
    if len(metrics) < 2:
        return chart.empty("Throughput")
    begin_s, end_s = metrics[0]["born_s"], metrics[-1]["born_s"]
    stretches = max(1, min(60, len(metrics) // 4))
    stretch_s = max((end_s - begin_s) / stretches, 1e-9)
    tokens = [0.0] * stretches
    for line in metrics[1:]:  # the first step's tokens were made before this clock starts
        tokens[min(int((line["born_s"] - begin_s) / stretch_s), stretches - 1)] += line["metrics"].get("tokens_trained", 0.0)
    curve = chart.Line("tokens", [((i + 0.5) * stretch_s, count / stretch_s) for i, count in enumerate(tokens)])
    return chart.line_chart("Throughput", [curve], "seconds since the first step", "tokens trained a second")


def idle_shares(metrics: Lines, events: Lines) -> dict[str, float]:
    """Service -> share of its time spent waiting: between joining and leaving; of the learner, between its steps."""
    waited: dict[str, float] = {}
    alive: dict[str, float] = {}
    joined: dict[str, float] = {}
    for event in events:
        if event["kind"] == "join":
            joined[event["source"]] = event["born_s"]
        elif event["kind"] == "leave" and event["source"] in joined and "wait_s" in event.get("data", {}):
            service = event["source"].partition("-")[0]  # "teacher-0-21172": service, replica, process
            waited[service] = waited.get(service, 0.0) + event["data"]["wait_s"]
            alive[service] = alive.get(service, 0.0) + event["born_s"] - joined.pop(event["source"])
    shares = {service: min(waited[service] / alive[service], 1.0) for service in waited if alive[service] > 0}
    order = ("feeder", "generator", "teacher", "packer", "learner")
    return {s: shares[s] for s in order if s in shares} | ({"learner": idle_fraction(metrics)} if metrics else {})


def _curve(metrics: Lines, name: str) -> list[tuple[float, float]]:
    return [(line["n"], line["metrics"][name]) for line in metrics if line["metrics"].get(name) is not None]


# ---------------------------------------------------------------- tables
def _figures_table(found: Mapping[str, Compared]) -> str:
    rows = [(name, number(of.before), number(of.after), number(of.teacher)) for name, of in found.items()]
    return _table(("metric", "before", "after", "teacher"), rows, "Nothing was evaluated.")


def _answers_table(folder: Path, evaluations: Sequence[Evaluation]) -> str:
    teacher = {s["prompt"]: s for e in evaluations if e.who != "student" for s in e.samples}
    rows = [
        (before["prompt"], _judged(before), _judged(after), _judged(teacher.get(before["prompt"], {})))
        for before, after in answers_before_and_after(folder)
    ]
    return _table(("question", "before", "after", "teacher"), rows, "Answers are shown once the student was evaluated twice.")


def _judged(sample: Mapping[str, str]) -> str:
    return sample.get("completion", "") + {"yes": "  ✓", "no": "  ✗"}.get(sample.get("correct", ""), "")


def _account_table(account: Summary | None) -> str:
    if account is None:
        return "<p>The run has no summary.json yet.</p>"
    rows = [("fed", account.groups_fed), ("trained", account.groups_trained), *account.groups_dropped.items()]
    rows += [("trained twice", account.duplicate_trainings)]
    groups = _table(("groups", "count"), [(name, f"{count:,}") for name, count in rows], "")
    peaks = [(service, f"{mb:,.0f} MB") for service, mb in account.peak_rss_mb.items()]
    return f'<div class="side">{groups}{_table(("service", "peak memory"), peaks, "No heartbeat told its memory.")}</div>'


def _events_table(events: Lines) -> str:
    told = sorted((e for e in events if e["kind"] not in EVERYDAY_EVENTS), key=lambda e: e["born_s"])
    begin_s = told[0]["born_s"] if told else 0.0
    rows = [(f"{e['born_s'] - begin_s:.1f} s", e["kind"], e["source"], e.get("text", "")) for e in told[-MOST_EVENTS:]]
    left_out = len(told) - len(rows)
    before = f"<p>{left_out:,} earlier events are in events.jsonl.</p>" if left_out > 0 else ""
    return before + _table(("time", "event", "from", ""), rows, "Nothing out of the ordinary.")


def _settings_table(config: Config | None) -> str:
    if config is None:
        return "<p>The run folder has no config.json.</p>"
    defaults = dict(configs.reference())
    changed = {key: value for key, value in configs.flat(config).items() if defaults.get(key) != value}
    return _table(("key", "value"), [(key, _shown_value(value)) for key, value in changed.items()], "All defaults.")


def _shown_value(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], when_empty: str) -> str:
    """Every cell is text, whatever it holds."""
    if not rows:
        return f"<p>{escape(when_empty)}</p>"
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_as_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _as_text(cell: str) -> str:
    """Escaped, and without the control characters that HTML does not know."""
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in cell))


# ---------------------------------------------------------------- the page
def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _page(name: str, sections: Sequence[str]) -> str:
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(name)} · streamopd</title><style>{CSS}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{"".join(sections)}</main></body></html>\n'


def _config(file: Path) -> Config | None:
    return msgspec.json.decode(file.read_bytes(), type=Config) if file.is_file() else None
