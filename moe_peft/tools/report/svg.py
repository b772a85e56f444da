"""Figures as SVG inside of a page: heat maps and line charts whose colors follow the page's theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

STEPS = 9  # colors of a scale, the middle one neutral
WIDTH, HEIGHT = 420, 200  # of a line chart
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 10, 34

Scale = Callable[[float], int]


def relative_scale(value: float) -> int:
    """Color of a share over the even share: the middle at one, the ends at a quarter and at four times.

    Args:
        value: At least zero.

    Returns:
        0 to 8.
    """
    exponent = math.log2(value) if value > 0 else -2.0
    return min(8, max(0, round(4 + 2 * exponent)))


def cosine_scale(value: float) -> int:
    """Color of a cosine: the middle at zero, the ends at -1 and 1."""
    return min(8, max(0, round(4 + 4 * value)))


def share_scale(value: float) -> int:
    """Color of a number from 0 to 1: the upper half of the scale."""
    return min(8, max(4, round(4 + 4 * value)))


@dataclass(frozen=True)
class Grid:
    """What a heat map shows.

    Attributes:
        rows, columns: Labels.
        values: (rows, columns) numbers; NaN for none.
        row_name, column_name: What the labels count.
        text: How a number is written.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    row_name: str = "layer"
    column_name: str = "expert"
    text: Callable[[float], str] = "{:.3f}".format


def heat_map(grid: Grid, scale: Scale, description: str) -> str:
    """Draw a cell for every number.

    Args:
        grid: The numbers.
        scale: Color of a number.
        description: What it shows, for those who do not see it.

    Returns:
        An svg element; each cell has a title with its number.
    """
    longest = max((len(column) for column in grid.columns), default=1)
    width = min(24.0, max(9.0, 300 / max(len(grid.columns), 1)))
    width = max(width, min(7.0 * longest + 8, 84.0)) if len(grid.columns) <= 12 else width
    height = min(24.0, max(10.0, 220 / max(len(grid.rows), 1)))
    left = 12 + 6.6 * max((len(row) for row in grid.rows), default=1)
    right, bottom = left + width * len(grid.columns), 18 + height * len(grid.rows)
    parts = [f'<text x="{left:.0f}" y="11">{escape(grid.column_name)}</text>']
    for row, (name, values) in enumerate(zip(grid.rows, grid.values, strict=True)):
        y = 16 + row * height
        for column, value in enumerate(values):
            known = value == value
            look = f"c{scale(value)}" if known else "cn"
            title = f"{grid.row_name} {name}, {grid.column_name} {grid.columns[column]}: "
            title += grid.text(value) if known else "not known"
            parts.append(
                f'<rect class="cell {look}" x="{left + column * width:.1f}" y="{y:.1f}" width="{width - 1:.1f}" '
                f'height="{height - 1:.1f}"><title>{escape(title)}</title></rect>'
            )
        if row % max(1, math.ceil(12 / height)) == 0:
            middle = y + height / 2 + 4
            parts.append(f'<text x="{left - 6:.0f}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
    every = max(1, math.ceil((7 * longest + 5) / width))
    for column in range(0, len(grid.columns), every):
        x = left + (column + 0.5) * width
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 11:.1f}" text-anchor="middle">{escape(grid.columns[column])}</text>'
        )
    end = 3.3 * longest if every > 1 else 0.0
    return _svg(right + max(4.0, end), bottom + 16, description, parts, natural=True)


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: What it is.
        values: Its numbers; NaN leaves a gap.
        band: Smallest and largest behind each, if any.
    """

    name: str
    values: Sequence[float]
    band: Sequence[tuple[float, float]] | None = None


def line_chart(x: Sequence[float], lines: Sequence[Line], description: str, *, x_name: str, top: float = 1.0) -> str:
    """Draw lines over whole numbers, from zero upwards.

    Args:
        x: Layers or steps, ascending.
        lines: Up to three.
        description: What it shows, for those who do not see it.
        x_name: What the whole numbers count.
        top: Largest number of the axis.
    """
    low, high = (min(x), max(x)) if x else (0, 1)
    span = (high - low) or 1

    def at(number: float, value: float) -> tuple[float, float]:
        share = (number - low) / span if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT), TOP + (1 - value / top) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for part in (0, 0.25, 0.5, 0.75, 1):
        y = at(low, part * top)[1]
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{part * top:.3g}</text>')
    for number in _ticks(x):
        anchor = "middle" if high == low else {low: "start", high: "end"}.get(number, "middle")
        parts.append(
            f'<text x="{at(number, 0)[0]:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">{number:g}</text>'
        )
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_name)}</text>')
    for index, line in enumerate(lines):
        points = [at(n, v) for n, v in zip(x, line.values, strict=True) if v == v]
        if line.band:
            known = [(n, own) for n, own in zip(x, line.band, strict=True) if own[0] == own[0]]
            edge = [at(n, own[1]) for n, own in known] + [at(n, own[0]) for n, own in reversed(known)]
            if len(known) > 1:
                parts.append(f'<polygon class="band s{index}" points="{_path(edge)}"/>')
        if len(points) > 1:
            parts.append(f'<polyline class="line s{index}" points="{_path(points)}"/>')
        if len(points) <= 40:
            named = [(n, v) for n, v in zip(x, line.values, strict=True) if v == v]
            for (px, py), (n, v) in zip(points, named, strict=True):
                title = f"{line.name}, {x_name} {n:g}: {v:.3f}"
                parts.append(
                    f'<circle class="dot s{index}" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{escape(title)}</title>'
                    "</circle>"
                )
    return _svg(WIDTH, HEIGHT, description, parts, natural=False)


def _ticks(x: Sequence[float]) -> list[float]:
    if len(x) <= 8:
        return list(x)
    return [x[round(number * (len(x) - 1) / 4)] for number in range(5)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg(width: float, height: float, description: str, parts: Sequence[str], *, natural: bool) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}"' if natural else 'class="wide"'
    return (
        f'<svg {size} viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(description)}">'
        + "".join(parts)
        + "</svg>"
    )
