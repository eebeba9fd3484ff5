"""summary.json: the account of a run, for machines. Its fields are stable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from streamopd.schemas import Evaluation, Heartbeat
from streamopd.watch.journal import write_atomically

KL_HELDOUT = "kl_teacher_student"
COUNTS = ("prompts",)  # metrics that say how many a mean is over: they weigh teachers, they are no result


class Ages(Struct, frozen=True):
    """Age of trained tokens, in optimizer steps."""

    mean: float
    p95: float
    max: float


class Swaps(Struct, frozen=True):
    """New weights taken by generators: all, those with requests in flight, and how long one took."""

    count: int
    in_flight: int
    median_s: float | None


class Compared(Struct, frozen=True):
    """One held-out metric; None: nobody measured it."""

    before: float | None
    after: float | None
    teacher: float | None


class Moved(Struct, frozen=True):
    """A figure that no teacher has."""

    before: float | None
    after: float | None


class Summary(Struct, frozen=True, kw_only=True):
    """What summary.json holds, all of it and nothing more."""

    status: str                          # "completed" | "stopped" | "failed"
    steps: int
    groups_fed: int
    groups_trained: int
    groups_dropped: dict[str, int]       # "expired", "filtered:<reason>", "dead:<reason>", "unused"
    duplicate_trainings: int             # groups whose gradient is in the weights more than once
    tokens_generated: int
    tokens_trained: int
    wall_s: float
    startup_s: float
    age_steps: Ages
    swaps: Swaps
    learner_idle_fraction: float
    eval: dict[str, Compared]
    kl_heldout: Moved                    # nats a token, KL(teacher‖student)
    peak_rss_mb: dict[str, float]        # service -> of its largest process


def summarise(
    *,
    status: str,
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
    fates: Mapping[int, str],
    unused: int,
    groups_fed: int,
    duplicate_trainings: int,
    beats: Iterable[Heartbeat],
    wall_s: float,
    startup_s: float,
) -> Summary:
    """The account, from what the run left behind.

    `metrics`: the lines of metrics.jsonl. `fates`: seq -> "trained" | "expired" | "filtered:…" | "dead:…".
    `beats`: the last heartbeat of every life of every process (a restarted process counts from zero again).
    """
    beats = list(beats)
    accounts = Counter(fates.values())
    trained = accounts.pop("trained", 0)
    compared = compare(evaluations)
    kl = compared.get(KL_HELDOUT, Compared(None, None, None))
    return Summary(
        status=status,
        steps=max((line["n"] for line in metrics), default=0),
        groups_fed=groups_fed,
        groups_trained=trained,
        groups_dropped=dict(sorted(accounts.items())) | {"unused": unused},
        duplicate_trainings=duplicate_trainings,
        tokens_generated=int(_total(beats, "generator", "tokens")),
        tokens_trained=int(sum(line["metrics"].get("tokens_trained", 0) for line in metrics)),
        wall_s=round(wall_s, 3),
        startup_s=round(startup_s, 3),
        age_steps=ages(add_histograms(line.get("age_steps", {}) for line in metrics)),
        swaps=swaps([beat for beat in beats if beat.service == "generator"]),
        learner_idle_fraction=idle_fraction(metrics),
        eval=compared,
        kl_heldout=Moved(kl.before, kl.after),
        peak_rss_mb=peaks(beats),
    )


def write(file: Path, summary: Summary) -> None:
    """Write summary.json so that a reader never sees half of it."""
    write_atomically(file, msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")


def read(file: Path) -> Summary:
    """The Summary in `file`."""
    return msgspec.json.decode(file.read_bytes(), type=Summary)


def add_histograms(histograms: Iterable[Mapping[str, int]]) -> dict[int, int]:
    """One histogram of many, keys as integers, ascending."""
    total: Counter[int] = Counter()
    for histogram in histograms:
        for key, count in histogram.items():
            total[int(key)] += count
    return dict(sorted(total.items()))


def ages(tokens_by_age: Mapping[int, int]) -> Ages:
    """Mean, 95th percentile (nearest rank) and maximum over tokens; zeros when nothing was trained."""
    total = sum(tokens_by_age.values())
    if not total:
        return Ages(0.0, 0.0, 0.0)
    mean = sum(age * count for age, count in tokens_by_age.items()) / total
    return Ages(round(mean, 4), float(_percentile(tokens_by_age, 0.95)), float(max(tokens_by_age)))


def swaps(generators: Sequence[Heartbeat]) -> Swaps:
    """All generators together; the median is over swaps when there is one generator, else over their medians."""
    seconds: Counter[float] = Counter()
    for beat in generators:
        if "swap_median_s" in beat.counters:
            seconds[beat.counters["swap_median_s"]] += int(beat.counters.get("swaps", 0))
    return Swaps(
        int(_total(generators, "generator", "swaps")),
        int(_total(generators, "generator", "swaps_in_flight")),
        _percentile(seconds, 0.5) if seconds.total() else None,
    )


def idle_fraction(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Share of the learner's time between its first and last step spent waiting for a batch."""
    waited = sum(line["metrics"].get("wait_s", 0.0) for line in metrics)
    worked = sum(line["metrics"].get("busy_s", 0.0) for line in metrics)
    return round(waited / (waited + worked), 4) if waited + worked else 0.0


def peaks(beats: Iterable[Heartbeat]) -> dict[str, float]:
    """Service -> resident MB of its largest process at its worst."""
    peak: dict[str, float] = {}
    for beat in beats:
        if "rss_mb" in beat.counters:
            peak[beat.service] = max(peak.get(beat.service, 0.0), beat.counters["rss_mb"])
    return dict(sorted(peak.items()))


def compare(evaluations: Sequence[Evaluation]) -> dict[str, Compared]:
    """Metric -> before, after, teacher. Of two evaluations of one model the later counts."""
    student = {evaluation.n: evaluation.metrics for evaluation in evaluations if evaluation.who == "student"}
    before = student[min(student)] if student else {}
    after = student[max(student)] if len(student) > 1 else {}
    teacher = teacher_figures(evaluations)
    names = [name for name in (*before, *after, *teacher) if name not in COUNTS]
    return {name: Compared(before.get(name), after.get(name), teacher.get(name)) for name in dict.fromkeys(names)}


def teacher_figures(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Each teacher answered its own held-out prompts: the mean over prompts, of those that report a metric."""
    teachers = {evaluation.who: evaluation.metrics for evaluation in evaluations if evaluation.who != "student"}
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for metrics in teachers.values():
        weight = metrics.get("prompts", 1.0)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + weight * value
            weights[name] = weights.get(name, 0.0) + weight
    return {name: sums[name] / weights[name] for name in sums if weights[name]}


def _total(beats: Iterable[Heartbeat], service: str, counter: str) -> float:
    return sum(beat.counters.get(counter, 0.0) for beat in beats if beat.service == service)


def _percentile(counts: Mapping[Any, int], fraction: float) -> Any:
    """Nearest rank: the smallest key with at least `fraction` of all at or below it."""
    needed = fraction * sum(counts.values())
    seen = 0
    for key in sorted(counts):
        seen += counts[key]
        if seen >= needed:
            return key
    raise AssertionError("a percentile of nothing")
