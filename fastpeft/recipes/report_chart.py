"""Line charts as SVG text that stands inside of a page, whose style sheet colours it (`report`); no matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8  # classes c0 to c7
_WIDTH, _HEIGHT = 760, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 10, 34
_MOST_POINTS = 1000  # of a line; more are not to be told apart on so many pixels


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        label: what it is.
        points: step -> value; a value that is not finite leaves a gap.
        colour: which of the page's colours.
        dashed: drawn with dashes and dots.
    """

    label: str
    points: Mapping[int, float]
    colour: int = 0
    dashed: bool = False


def line_chart(title: str, lines: Sequence[Line]) -> str:
    """Draw curves over steps.

    Args:
        title: of the value's axis, with the unit.
        lines: the curves; those without a point are left out.
    Returns:
        A ``figure`` element with a legend where there are several curves.
    """
    lines = [line for line in lines if line.points]
    finite = [value for line in lines for value in line.points.values() if math.isfinite(value)]
    steps = [step for line in lines for step in line.points]
    lowest, highest = min([0.0, *finite]), max([0.0, *finite])
    y_ticks = ticks(lowest, highest)
    first, last = min(steps, default=0), max(steps, default=1)
    x_ticks = [tick for tick in ticks(first, last, 8, least=1) if first <= tick <= last]
    across = _Scale(first, last, _LEFT, _WIDTH - _RIGHT)
    up = _Scale(min(lowest, y_ticks[0]), max(highest, y_ticks[-1]), _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} over steps">']
    for value in y_ticks:
        y = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in x_ticks:
        x = across(value)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:.0f}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 3}" text-anchor="middle">step</text>')
    for line in lines:
        parts += _drawn(line, across, up)
    key = "".join(
        f'<span class="key{" dashed" * line.dashed} c{line.colour}">{escape(line.label)}</span>' for line in lines
    )
    legend = f'<p class="legend">{key}</p>' if len(lines) > 1 else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend}{''.join(parts)}</svg></figure>"


def ticks(low: float, high: float, about: int = 5, least: float = 0.0) -> list[float]:
    """Round numbers that span a range.

    Args:
        low: the range's beginning.
        high: its end.
        about: how many steps there may be; a step is 1, 2 or 5 times a power of ten.
        least: the smallest step.
    """
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * about >= span * (1 - 1e-9))
    step = max(step, least)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def thinned(points: Mapping[int, float]) -> list[tuple[int, float]]:
    """Points in the order of steps; of very many the extremes of each stretch, and a gap where it has one."""
    ordered = sorted(points.items())
    size = math.ceil(2 * len(ordered) / _MOST_POINTS)
    if size <= 2:
        return ordered
    kept = [ordered[0]]
    for first in range(0, len(ordered), size):
        some = ordered[first : first + size]
        finite = [point for point in some if math.isfinite(point[1])]
        kept += [point for point in some if not math.isfinite(point[1])][:1]
        if finite:
            kept += [min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])]
    return sorted(dict([*kept, ordered[-1]]).items())


@dataclass(frozen=True)
class _Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + share * (self.end - self.start)


def _drawn(line: Line, across: _Scale, up: _Scale) -> list[str]:
    """The stretches of a line between gaps; dots where points are few, or alone in a stretch."""
    stretches: list[list[str]] = [[]]
    for step, value in thinned(line.points):
        if math.isfinite(value):
            stretches[-1].append(f"{across(step):.1f},{up(value):.1f}")
        elif stretches[-1]:
            stretches.append([])
    kind = f"c{line.colour}{' dashed' * line.dashed}"
    parts = []
    for stretch in stretches:
        if len(stretch) > 1:
            parts.append(f'<polyline class="{kind}" points="{" ".join(stretch)}"/>')
        if line.dashed or len(stretch) == 1:
            parts += [f'<circle class="{kind}" cx="{x}" cy="{y}" r="3"/>' for x, y in (p.split(",") for p in stretch)]
    return parts
