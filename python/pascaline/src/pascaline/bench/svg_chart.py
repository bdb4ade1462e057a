"""Charts as SVG text: lines with intervals, and bars.

Each chart carries its own style, follows the reader's light or dark setting, and gives every value as a tooltip.

Not matplotlib, whose SVG has fixed colours and no tooltips, nor plotly, which needs a script: a report is one file that
loads nothing.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 28, 40, 52
"""Margins around the plot area, pixels."""
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2")
"""Most colour-blind people can tell these apart, on a light and on a dark background."""
LEGEND_ROW = 16
LEGEND_COLUMNS, LEGEND_MARK = 3, 36
"""Most names of the legend in a row, and the room beside a name, pixels."""
CHARACTER = 7.0
"""Width of a character at most, on average over a text, pixels."""
LABEL_ROOM = 1.06
"""Least ratio of the highest tick to the highest value: leaves room for what is written above it."""
MAX_TICKS = 6
NARROW_BAR = 32.0
"""If a bar is narrower than this, the value above it is written smaller. Pixels."""

_STYLE = """
svg.chart { font: 12px system-ui, sans-serif; background: #fff; color: #1f2937; }
svg.chart text { fill: currentColor; } svg.chart .title { font-weight: 600; font-size: 14px; }
svg.chart .small { font-size: 9px; }
svg.chart .grid { stroke: currentColor; opacity: .15; } svg.chart .axis { stroke: currentColor; opacity: .6; }
@media (prefers-color-scheme: dark) { svg.chart { background: #111827; color: #e5e7eb; } }
"""


@dataclass(frozen=True, slots=True)
class Mark:
    """One value. x: a number, or the position of a category."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    """Text beside the mark."""


@dataclass(frozen=True, slots=True)
class Series:
    """Values that belong together."""

    name: str
    marks: Sequence[Mark]
    dashed: bool = False
    """Whether the line is dashed, for values that were not measured: claims, estimates, limits."""
    joined: bool = True
    """Whether a line joins the marks."""
    dots: bool = True
    """Whether each value has a dot; off for curves of many values."""


@dataclass(frozen=True, slots=True)
class Chart:
    """The content of a chart."""

    title: str
    x_title: str
    y_title: str
    series: Sequence[Series]
    categories: Sequence[str] = field(default=())
    """Names of the positions 0, 1, 2, …; empty for an axis of numbers."""


def line_chart(chart: Chart) -> str:
    """Return the chart with a line for each series."""
    area = _Area(chart)
    parts = [*area.frame()]
    for number, series in enumerate(chart.series):
        parts += _series(area, series, COLOURS[number % len(COLOURS)])
    return area.document(parts)


def bar_chart(chart: Chart) -> str:
    """Return the chart with a bar for each value; the bars of one category stand side by side."""
    area = _Area(chart)
    parts = [*area.frame()]
    slot = (WIDTH - LEFT - RIGHT) / max(1, len(chart.categories))
    wide = slot * 0.8 / max(1, len(chart.series))
    labels = []
    for number, series in enumerate(chart.series):
        for mark in series.marks:
            left = area.x(mark.x) - slot * 0.4 + number * wide
            parts.append(_bar(area, mark, series, left, wide, COLOURS[number % len(COLOURS)]))
            labels.append(_bar_label(area, mark, left, wide))
    # Last, so that no neighbour covers them.
    return area.document([*parts, *labels])


class _Area:
    """The plot area: converts values to pixels."""

    def __init__(self, chart: Chart) -> None:
        self._chart = chart
        marks = [mark for series in chart.series for mark in series.marks]
        ends = [value for mark in marks for value in (mark.y, mark.high) if value is not None]
        self._y_ticks = ticks(0.0, LABEL_ROOM * (max(ends, default=1.0) or 1.0))
        self._x_ticks = [] if chart.categories else ticks(0.0, max((mark.x for mark in marks), default=1.0) or 1.0)
        longest = LEGEND_MARK + CHARACTER * max((len(series.name) for series in chart.series), default=0)
        self._columns = max(1, min(LEGEND_COLUMNS, int((WIDTH - LEFT - RIGHT) // longest)))
        rows = math.ceil(len(chart.series) / self._columns) if len(chart.series) > 1 else 0
        self._top = TOP + LEGEND_ROW * rows
        self._height = self._top + HEIGHT - TOP

    def x(self, value: float) -> float:
        """Return the pixel of a value."""
        span = WIDTH - LEFT - RIGHT
        if self._chart.categories:
            return LEFT + span * (value + 0.5) / len(self._chart.categories)
        return LEFT + span * value / self._x_ticks[-1]

    def y(self, value: float) -> float:
        """Return the pixel of a value."""
        bottom = self._height - BOTTOM
        return bottom - (bottom - self._top) * max(0.0, value) / self._y_ticks[-1]

    def frame(self) -> list[str]:
        """Return titles, axes, grid and legend."""
        chart, bottom = self._chart, self._height - BOTTOM
        middle = (self._top + bottom) / 2
        parts = [
            _text(WIDTH / 2, 20, chart.title, "middle", "title"),
            _text((LEFT + WIDTH - RIGHT) / 2, self._height - 10, chart.x_title, "middle"),
            f'<text x="16" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 16 {middle:.1f})">'
            f"{html.escape(chart.y_title)}</text>",
        ]
        for tick in self._y_ticks:
            parts.append(_line(LEFT, self.y(tick), WIDTH - RIGHT, self.y(tick), "grid"))
            parts.append(_text(LEFT - 6, self.y(tick) + 4, number(tick), "end"))
        positions = [(float(n), name) for n, name in enumerate(chart.categories)]
        for value, name in positions or [(tick, number(tick)) for tick in self._x_ticks]:
            parts.append(_text(self.x(value), bottom + 18, name, "middle"))
        parts += [_line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis"), _line(LEFT, self._top, LEFT, bottom, "axis")]
        return parts + self._legend()

    def _legend(self) -> list[str]:
        if len(self._chart.series) < 2:
            return []
        parts = []
        column = (WIDTH - LEFT - RIGHT) / self._columns
        for n, series in enumerate(self._chart.series):
            x, y = LEFT + column * (n % self._columns), 36 + LEGEND_ROW * (n // self._columns)
            colour = COLOURS[n % len(COLOURS)]
            dash = ' stroke-dasharray="5 4"' if series.dashed else ""
            parts.append(
                f'<line x1="{x:.1f}" y1="{y}" x2="{x + 18:.1f}" y2="{y}" stroke="{colour}" stroke-width="3"{dash}/>'
            )
            parts.append(_text(x + 24, y + 4, series.name, "start"))
        return parts

    def document(self, parts: Sequence[str]) -> str:
        """Return the whole picture."""
        content = "\n".join(parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {self._height}" '
            f'width="{WIDTH}" height="{self._height}" role="img" aria-label="{html.escape(self._chart.title)}">\n'
            f"<style>{_STYLE}</style>\n{content}\n</svg>\n"
        )


def _series(area: _Area, series: Series, colour: str) -> list[str]:
    parts = []
    dash = ' stroke-dasharray="5 4"' if series.dashed else ""
    if series.joined and len(series.marks) > 1:
        path = " ".join(f"{area.x(mark.x):.1f},{area.y(mark.y):.1f}" for mark in series.marks)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
    for mark in series.marks if series.dots else ():
        x, y = area.x(mark.x), area.y(mark.y)
        if mark.low is not None and mark.high is not None:
            low, high = area.y(mark.low), area.y(mark.high)
            parts += [
                f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" stroke="{colour}"/>',
                *(
                    f'<line x1="{x - 4:.1f}" y1="{end:.1f}" x2="{x + 4:.1f}" y2="{end:.1f}" stroke="{colour}"/>'
                    for end in (low, high)
                ),
            ]
        fill = "none" if series.dashed else colour
        tip = html.escape(f"{series.name}: {number(mark.y)}")
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}"><title>{tip}</title></circle>'
        )
        if mark.label:
            # Towards the middle, so that the text stays inside the picture.
            is_left = x < (LEFT + WIDTH - RIGHT) / 2
            parts.append(_text(x + 8 if is_left else x - 8, y - 6, mark.label, "start" if is_left else "end"))
    return parts


def _bar(area: _Area, mark: Mark, series: Series, left: float, wide: float, colour: str) -> str:
    top, bottom = area.y(mark.y), area.y(0.0)
    tip = html.escape(f"{series.name}: {number(mark.y)}")
    look = f'fill="none" stroke="{colour}" stroke-dasharray="5 4"' if series.dashed else f'fill="{colour}"'
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{wide - 2:.1f}" height="{max(0.0, bottom - top):.1f}" {look}>'
        f"<title>{tip}</title></rect>"
    )


def _bar_label(area: _Area, mark: Mark, left: float, wide: float) -> str:
    kind = "small" if wide < NARROW_BAR else ""
    return _text(left + wide / 2 - 1, area.y(mark.y) - 4, mark.label or number(mark.y), "middle", kind)


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers from `low` to at least `high`, at most MAX_TICKS + 1 of them."""
    if not high > low:
        high = low + 1
    rough = (high - low) / (MAX_TICKS - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    count = math.ceil((high - low) / step - 1e-9)
    return [low + step * n for n in range(count + 1)]


def number(value: float) -> str:
    """Return a number with three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def pareto_front(points: Sequence[Mark], better: Callable[[Mark, Mark], bool]) -> list[Mark]:
    """Return the marks that no other mark beats, by ascending x."""
    front = [mark for mark in points if not any(better(other, mark) for other in points if other is not mark)]
    return sorted(front, key=lambda mark: mark.x)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    look = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}>{html.escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'
