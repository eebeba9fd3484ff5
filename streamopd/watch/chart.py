"""Small charts as SVG text: lines, bars, shares. Colours come from the page's CSS, so that light and dark both fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Literal

from msgspec import Struct

WIDTH, HEIGHT = 560, 270
Marks = Sequence[tuple[str, float]]        # vertical lines: (name, x)
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 44, 40  # margins of the drawing
MOST_POINTS = 400                          # of a line; more are averaged, nobody can see them


class Line(Struct, frozen=True):
    """One named curve; `points` as (x, y), ascending in x."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: Literal["solid", "dashed", "dots"] = "solid"


class Scale(Struct, frozen=True):
    """From values to pixels along one axis."""

    low: float
    high: float
    start_px: float
    end_px: float

    def __call__(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low)
        return round(self.start_px + part * (self.end_px - self.start_px), 1)


def line_chart(title: str, lines: Sequence[Line], x_label: str, y_label: str, y_high: float | None = None) -> str:
    """Curves over one pair of axes. The y axis begins at 0, or below where a value does."""
    lines = [Line(line.name, thin(line.points), line.kind) for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    if not xs:
        return empty(title)
    x_at, y_at = _scales((min(xs), max(xs)), (min(0.0, *ys), y_high or max(ys)))
    marks = [_axes(x_at, y_at, x_label, y_label)]
    marks += [_curve(line, index, x_at, y_at) for index, line in enumerate(lines)]
    return _svg(title, [(line.name, line.kind) for line in lines], marks)


def bar_chart(
    title: str, groups: Mapping[str, Mapping[int, float]], x_label: str, y_label: str, bin_width: int = 1, marks: Marks = ()
) -> str:
    """Histograms side by side: name -> {bin: height}; a bin begins at its key, one of width 1 is centred on it."""
    groups = {name: bins for name, bins in groups.items() if bins}
    if not groups:
        return empty(title)
    shift = bin_width / 2 if bin_width == 1 else 0.0
    low = min(edge for bins in groups.values() for edge in bins) - shift
    high = max(edge for bins in groups.values() for edge in bins) - shift + bin_width
    highest = max(height for bins in groups.values() for height in bins.values())
    x_at, y_at = _scales((low, max([high] + [x + 0.5 for _, x in marks])), (0.0, highest))
    parts = [_axes(x_at, y_at, x_label, y_label)]
    for index, (name, bins) in enumerate(groups.items()):
        for edge in sorted(bins):
            left, right = (edge - shift + bin_width * (0.08 + 0.84 * part / len(groups)) for part in (index, index + 1))
            hint = f"{name}, {edge}: {bins[edge]:,.0f}"
            parts.append(_rect(f"fill s{index}", (x_at(left), x_at(right)), (y_at(bins[edge]), y_at(0)), hint))
    parts += [_vertical(name, x_at(x)) for name, x in marks]
    return _svg(title, [(name, "bar") for name in groups], parts)


def share_chart(title: str, shares: Mapping[str, float], label: str) -> str:
    """One horizontal bar a name, of shares between 0 and 1."""
    if not shares:
        return empty(title)
    x_at = Scale(0.0, 1.0, LEFT + 60, WIDTH - RIGHT - 50)
    row = (HEIGHT - TOP - BOTTOM) / max(len(shares), 4)
    parts = []
    for i, (name, share) in enumerate(shares.items()):
        top, bottom = TOP + (i + 0.2) * row, TOP + (i + 0.8) * row
        parts.append(_rect("track", (x_at(0), x_at(1)), (top, bottom), name))
        parts.append(_rect("fill s0", (x_at(0), x_at(share)), (top, bottom), f"{name}: {share:.1%}"))
        parts.append(_text(x_at(0) - 8, (top + bottom) / 2 + 4, name, "end"))
        parts.append(_text(x_at(1) + 8, (top + bottom) / 2 + 4, f"{share:.0%}", "start"))
    parts.append(_text((x_at(0) + x_at(1)) / 2, HEIGHT - 6, label, "middle", "label"))
    return _svg(title, [], parts)


def empty(title: str) -> str:
    """A chart of nothing, that says so."""
    return _svg(title, [], [_text(WIDTH / 2, HEIGHT / 2, "nothing recorded", "middle", "label")])


def thin(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbours; points that are no numbers are left out."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = math.ceil(len(finite) / most) or 1
    chunks = [finite[i : i + size] for i in range(0, len(finite), size)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Mean over the last `window` points, at each."""
    means = []
    for i, (x, _) in enumerate(points):
        recent = points[max(0, i + 1 - window) : i + 1]
        means.append((x, sum(y for _, y in recent) / len(recent)))
    return means


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers within [low, high], about `about` of them."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * nice for nice in (1, 2, 5, 10) if unit * nice >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def short(value: float) -> str:
    """A tick's text: 12000 -> 12k, 0.25 -> 0.25."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def _scales(x: tuple[float, float], y: tuple[float, float]) -> tuple[Scale, Scale]:
    x_high, y_high = (high if high > low else low + 1.0 for low, high in (x, y))
    x_at = Scale(x[0], x_high, LEFT, WIDTH - RIGHT)
    return x_at, Scale(y[0], y_high + 0.04 * (y_high - y[0]), HEIGHT - BOTTOM, TOP)


def _axes(x_at: Scale, y_at: Scale, x_label: str, y_label: str) -> str:
    parts = []
    for value in ticks(y_at.low, y_at.high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(value)}" y2="{y_at(value)}"/>')
        parts.append(_text(LEFT - 7, y_at(value) + 4, short(value), "end"))
    parts += [_text(x_at(value), HEIGHT - BOTTOM + 16, short(value), "middle") for value in ticks(x_at.low, x_at.high, 7)]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(y_at.low)}" y2="{y_at(y_at.low)}"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle", "label"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'<g transform="rotate(-90 12 {middle:.0f})">{_text(12, middle, y_label, "middle", "label")}</g>'
    return "".join([*parts, turned])


def _curve(line: Line, index: int, x_at: Scale, y_at: Scale) -> str:
    pixels = [(x_at(x), y_at(min(max(y, y_at.low), y_at.high))) for x, y in line.points]
    if line.kind == "dots" or len(pixels) == 1:
        hints = [f"<title>{escape(line.name)}: {y:.3g} at {x:g}</title>" for x, y in line.points]
        dots = zip(pixels, hints, strict=True)
        return "".join(f'<circle class="fill s{index}" cx="{x}" cy="{y}" r="5">{hint}</circle>' for (x, y), hint in dots)
    path = " ".join(f"{x},{y}" for x, y in pixels)
    return f'<polyline class="line {line.kind} s{index}" points="{path}"/>'


def _rect(kind: str, x: tuple[float, float], y: tuple[float, float], hint: str) -> str:
    size = f'width="{max(x[1] - x[0], 0.5):.1f}" height="{y[1] - y[0]:.1f}"'
    return f'<rect class="{kind}" x="{x[0]:.1f}" y="{y[0]:.1f}" {size} rx="2"><title>{escape(hint)}</title></rect>'


def _vertical(name: str, x: float) -> str:
    line = f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return line + _text(x - 5, TOP + 10, name, "end", "label")


def _svg(title: str, legend: Sequence[tuple[str, str]], parts: Sequence[str]) -> str:
    head = f'<text class="title" x="0" y="16">{escape(title)}</text>'
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        + "".join([head, _legend(legend), *parts])
        + "</svg>"
    )


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    """Swatch and name of each series, in one row; a lone series needs none: the title names it."""
    if len(entries) < 2:
        return ""
    parts, x = [], float(LEFT)
    for index, (name, kind) in enumerate(entries):
        if kind in ("bar", "dots"):
            parts.append(_rect(f"fill s{index}", (x, x + 10), (25, 35), name))
        else:
            parts.append(f'<line class="line {kind} s{index}" x1="{x}" x2="{x + 14}" y1="30" y2="30"/>')
        parts.append(_text(x + 19, 34, name, "start"))
        x += 34 + 6.4 * len(name)
    return "".join(parts)


def _text(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
