"""Figures for Prometheus: each service its own, as its heartbeat tells them; the supervisor the streams and the learning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from streamopd.errors import ConfigError
from streamopd.schemas import Heartbeat
from streamopd.stream import Counters

ADDRESS_ENV = "STREAMOPD_METRICS"  # "HOST:PORT" at which a service shows its figures; unset: nowhere
OF_SERVICE = ("service", "replica")
# a counter of the heartbeat -> (name, what it says); what ends in _total only grows while the process lives
TOLD = {
    "tokens": ("streamopd_tokens_generated_total", "tokens written by the student"),
    "tokens_trained": ("streamopd_tokens_trained_total", "tokens that the learner trained"),
    "swaps": ("streamopd_swaps_total", "versions of the weights taken"),
    "swaps_in_flight": ("streamopd_swaps_in_flight_total", "of these with requests in flight"),
    "swaps_refused": ("streamopd_swaps_refused_total", "versions that did not load"),
    "swap_median_s": ("streamopd_swap_median_seconds", "of the last 200 swaps"),
    "wait_s": ("streamopd_wait_seconds_total", "seconds spent waiting for work"),
    "cpu_s": ("streamopd_cpu_seconds_total", "CPU seconds of the process"),
    "rss_mb": ("streamopd_peak_rss_megabytes", "largest resident memory so far"),
}
# counters of the heartbeat named "KEY/WHAT" -> (name, what they say, the label that WHAT is a value of)
TOLD_BY = {"teacher_tokens": ("streamopd_teacher_tokens_total", "tokens of answers scored, by who scored them", "teacher")}
LEARNED = ("loss", "kl_bound", "kl", "accuracy", "grad_norm", "mismatch_kl", "entropy_gap", "stop_gap", "truncated_ratio", "ess")


class ServiceFigures(Collector):
    """One service instance."""

    def __init__(self) -> None:
        self.beat: Heartbeat | None = None

    def collect(self) -> Iterable[Metric]:
        if self.beat is None:
            return
        beat, labels = self.beat, [self.beat.service, self.beat.instance]
        yield _family("streamopd_progress_total", "moves with the work", labels, float(beat.progress))
        yield _family("streamopd_weights_version", "weights served, -1: none", labels, float(beat.version))
        yield _family("streamopd_waiting", "1 while it waits for something", labels, float(beat.state == "waiting"))
        yield _family("streamopd_behind", "1 while it could not take new weights", labels, float(beat.state == "behind"))
        for key, value in sorted(beat.counters.items()):
            if key in TOLD:
                yield _family(*TOLD[key], labels, value)
        for key, (name, text, label) in TOLD_BY.items():
            parts = {at.partition("/")[2]: value for at, value in sorted(beat.counters.items()) if at.startswith(f"{key}/")}
            family = CounterMetricFamily(name, text, labels=(*OF_SERVICE, label))
            for part, value in parts.items():
                family.add_metric([*labels, part], value)
            if parts:
                yield family


class RunFigures(Collector):
    """The run as the supervisor sees it."""

    def __init__(self) -> None:
        self.counters: Counters | None = None
        self.learned: Mapping[str, float] = {}

    def collect(self) -> Iterable[Metric]:
        if self.counters is None:
            return
        depth = GaugeMetricFamily("streamopd_groups_in_flight", "groups between two services, by what they are", labels=["stage"])
        for stage, count in self.counters.inflight.items():
            depth.add_metric([stage], count)
        yield depth
        yield _family("streamopd_steps_total", "steps done", [], float(self.counters.steps), ())
        yield _family("streamopd_groups_issued_total", "groups that have begun", [], float(self.counters.issued), ())
        yield _family("streamopd_groups_fated_total", "groups that have ended", [], float(self.counters.fated), ())
        yield _family("streamopd_in_flight_bytes", "payload on its way", [], float(self.counters.bytes_inflight), ())
        learned = GaugeMetricFamily("streamopd_learning", "of the newest step, by its name in metrics.jsonl", labels=["metric"])
        for name in LEARNED:
            if self.learned.get(name) is not None:  # what was no number is null in the journal
                learned.add_metric([name], self.learned[name])
        yield learned


def show_metrics(address: str, figures: Collector) -> None:
    """Serve `figures` at "HOST:PORT", from a thread that ends with the process."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdecimal()):
        raise ConfigError(f"{ADDRESS_ENV} is {address!r}; it is HOST:PORT, for example 127.0.0.1:9100.")
    registry = CollectorRegistry()
    registry.register(figures)
    try:
        start_http_server(int(port), host, registry)
    except OSError as error:
        raise ConfigError(f"{ADDRESS_ENV}: nothing can listen on {address} ({error.strerror}). Give another port, or unset it.") from None


def _family(name: str, text: str, labels: list[str], value: float, names: tuple[str, ...] = OF_SERVICE) -> Metric:
    kind: Any = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family: Metric = kind(name, text, labels=names)
    family.add_metric(labels, value)  # type: ignore[attr-defined]
    return family
