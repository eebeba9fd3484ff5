"""Charts are well-formed SVG whose marks lie inside the frame; nothing to draw is said, not drawn."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamopd.watch.chart import HEIGHT, WIDTH, Line, bar_chart, line_chart, share_chart, short, smooth, thin, ticks

NOTHING = [line_chart("t", [Line("a", [])], "x", "y"), bar_chart("t", {"a": {}}, "x", "y"), share_chart("t", {}, "x")]
numbers = st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-6)


def points_of(svg: str) -> list[tuple[float, float]]:
    root = ET.fromstring(svg)
    drawn = [tuple(map(float, pair.split(","))) for line in root.iter("polyline") for pair in line.get("points").split()]
    return drawn + [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter("circle")]


def words(svg: str) -> set[str | None]:
    return {text.text for text in ET.fromstring(svg).iter("text")}


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30))
def test_every_point_lies_inside_the_frame(points):
    points = sorted(points)
    for x, y in points_of(line_chart("t", [Line("a", points), Line("b", points[:1])], "x", "y")):
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 60), st.integers(1, 10**6), min_size=1), st.integers(1, 8))
def test_every_bar_lies_inside_the_frame_and_the_highest_is_the_largest(bins, width):
    bins = {edge * width: height for edge, height in bins.items()}
    root = ET.fromstring(bar_chart("t", {"trained": bins}, "x", "y", bin_width=width, marks=[("cap", 8.5)]))
    bars = {int(bar.find("title").text.split()[1].rstrip(":")): bar for bar in root.iter("rect")}
    assert bars.keys() == bins.keys()
    for bar in bars.values():
        assert float(bar.get("x")) >= 0
        assert float(bar.get("x")) + float(bar.get("width")) <= WIDTH
        assert 0 <= float(bar.get("height")) <= HEIGHT
    heights = {edge: float(bar.get("height")) for edge, bar in bars.items()}
    assert heights[max(bins, key=bins.get)] == max(heights.values())


def test_a_legend_names_every_series_of_several_and_a_lone_one_has_none():
    level = [(0.0, 1.0), (1.0, 1.0)]
    both = line_chart("t", [Line("held <out>", level[:1]), Line("teacher", level)], "x", "y")
    assert {"held <out>", "teacher"} <= words(both)
    assert "lonely" not in words(line_chart("t", [Line("lonely", level)], "x", "y"))


@pytest.mark.parametrize("svg", NOTHING)
def test_a_chart_of_nothing_says_so(svg):
    assert "nothing recorded" in svg
    assert points_of(svg) == []


def test_missing_values_leave_a_gap_not_a_crash():
    assert thin([(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 2.0)]) == [(0, 1.0), (3, 2.0)]


def test_a_long_run_is_thinned_without_moving_its_mean():
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    thinned = thin(points)
    assert len(thinned) <= 400
    assert sum(y for _, y in thinned) / len(thinned) == pytest.approx(3.0, abs=0.01)


def test_smoothing_looks_back_only():
    assert smooth([(0, 0.0), (1, 2.0), (2, 4.0)], 2) == [(0, 0.0), (1, 1.0), (2, 3.0)]


@settings(deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_ticks_are_few_and_inside(low, span):
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 14
    assert all(low - 1e-6 * (span + abs(low)) <= tick <= low + span + 1e-6 * (span + abs(low)) for tick in found)


def test_ticks_are_written_short():
    assert [short(x) for x in (0.0, 0.25, 12_000.0, 3e6, 100.0)] == ["0", "0.25", "12k", "3M", "100"]
