"""What Prometheus is told: the heartbeat's own numbers, under the names that the dashboard asks for."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from streamopd.errors import ConfigError
from streamopd.schemas import Heartbeat
from streamopd.stream import Counters
from streamopd.watch.metrics import TOLD, RunFigures, ServiceFigures, show_metrics

DASHBOARD = Path(__file__).parent.parent.parent / "compose/observe/grafana/dashboards/streamopd.json"
COUNTERS = Counters(
    boot="b", stamped=True, issued=9, fated=5, steps=4, batchno=4, end="", again=(),
    inflight={"issued": 1, "generated": 2, "scored": 0, "batched": 1}, bytes_inflight=10, weights_n=4,
)


def service_figures() -> ServiceFigures:
    figures = ServiceFigures()
    figures.beat = Heartbeat(
        service="generator", instance="generator-7", pid=1, born_s=1.5, progress=9, state="waiting", version=3,
        counters=dict.fromkeys(TOLD, 2.0) | {"moved_s": 5.0},
    )
    return figures


def run_figures() -> RunFigures:
    figures = RunFigures()
    figures.counters, figures.learned = COUNTERS, {"loss": 0.25, "not_shown": 1.0}
    return figures


def shown(figures: ServiceFigures | RunFigures) -> str:
    registry = CollectorRegistry()
    registry.register(figures)
    return generate_latest(registry).decode()


def test_a_service_shows_what_its_heartbeat_says() -> None:
    text = shown(service_figures())
    label = '{replica="generator-7",service="generator"}'
    for line in (f"streamopd_weights_version{label} 3.0", f"streamopd_progress_total{label} 9.0", f"streamopd_waiting{label} 1.0",
                 f"streamopd_behind{label} 0.0", f"streamopd_tokens_generated_total{label} 2.0"):
        assert line in text
    assert "moved_s" not in text


def test_tokens_are_shown_by_the_teacher_that_scored_them() -> None:
    figures = service_figures()
    figures.beat.counters["teacher_tokens/math"], figures.beat.counters["teacher_tokens/code"] = 7.0, 3.0
    text = shown(figures)
    for teacher, tokens in (("math", "7.0"), ("code", "3.0")):
        assert f'streamopd_teacher_tokens_total{{replica="generator-7",service="generator",teacher="{teacher}"}} {tokens}' in text
    assert text.count("# TYPE streamopd_teacher_tokens_total") == 1


def test_the_supervisor_shows_the_streams_and_the_learning() -> None:
    text = shown(run_figures())
    assert 'streamopd_groups_in_flight{stage="generated"} 2.0' in text
    assert "streamopd_steps_total 4.0" in text
    assert 'streamopd_learning{metric="loss"} 0.25' in text
    assert "not_shown" not in text


def test_nothing_is_shown_before_there_is_something() -> None:
    assert shown(ServiceFigures()) == shown(RunFigures()) == ""


def test_the_dashboard_asks_for_names_that_exist_and_for_every_name() -> None:
    told = set(re.findall(r"^(streamopd_\w+)", shown(service_figures()) + shown(run_figures()), re.MULTILINE))
    queries = [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
    asked = set(re.findall(r"streamopd_\w+", " ".join(queries)))
    assert asked <= told
    left_out = {"streamopd_progress_total", "streamopd_waiting", "streamopd_swaps_total", "streamopd_swaps_in_flight_total",
                "streamopd_in_flight_bytes"}
    assert told - asked == left_out, "a new figure gets a panel, or is left out on purpose"


def test_figures_are_served_at_an_address_and_a_wrong_one_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"nothing can listen on 127\.0\.0\.1:{port}"):
            show_metrics(f"127.0.0.1:{port}", service_figures())
    show_metrics(f"127.0.0.1:{port}", service_figures())
    assert b"streamopd_weights_version" in urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read()
    with pytest.raises(ConfigError, match="it is HOST:PORT"):
        show_metrics("9100", service_figures())
