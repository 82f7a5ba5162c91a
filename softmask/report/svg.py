"""Inline SVG for the report: line charts with axes, and outlines of masks, as plain strings.

Colours are CSS variables of the page, so charts follow its light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 44, 62, 10, 40
CHARACTER = 7  # width of a tick's character, at most


@dataclass
class Series:
    """One logged quantity over the steps of training; `smoothed`: drawn as it is and as its average."""

    title: str
    unit: str
    steps: list[float]
    values: list[float]
    smoothed: bool = True


def nice_step(span: float, target: int) -> float:
    """1, 2 or 5 times a power of ten, so that it divides `span` into about `target` parts."""
    rough = span / target
    power = 10.0 ** math.floor(math.log10(rough))
    return min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))


def ticks(low: float, high: float, target: int) -> list[float]:
    """Round numbers within [low, high]."""
    step = nice_step(high - low, target)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def label(value: float) -> str:
    """The text of a tick, such as 0.05, 2.5, 800 or 12k."""
    if value and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value / 1000:g}k" if abs(value) >= 10000 else f"{round(value, 6):g}"


def smooth(values: np.ndarray, *, share: float = 0.02) -> np.ndarray:
    """Gaussian average with sigma `share` of the length, at least one point; renormalized at the ends."""
    sigma = max(1.0, share * len(values))
    position = np.arange(len(values))
    reach = int(3 * sigma) + 1
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weight = np.convolve(np.ones(len(values)), kernel)[position + reach]
    return np.convolve(values, kernel)[position + reach] / weight


def line_path(x: np.ndarray, y: np.ndarray) -> str:
    points = [f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    return "M" + "L".join(points)


def value_range(values: np.ndarray) -> tuple[float, float]:
    """The range of the y axis: from 0 if the curve then spans at least half of it, else close around the curve."""
    low, high = float(values.min()), float(values.max())
    if low >= 0 and low <= 0.5 * high:
        low = 0.0
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    return low, high + 0.04 * (high - low)


def line_chart(series: Series, *, width: int, height: int) -> str:
    """A chart of the raw values (pale) and their smoothed course, labelled with its last value; without smoothing, of
    the values with a dot each."""
    pairs = [(step, value) for step, value in zip(series.steps, series.values, strict=True) if math.isfinite(value)]
    if not pairs:
        return f'<p class="muted">{escape(series.title)}: no finite value was logged.</p>'
    steps, values = np.array(pairs, dtype=np.float64).T
    right, top, bottom = width - MARGIN_RIGHT, MARGIN_TOP, height - MARGIN_BOTTOM
    low, high = value_range(values)
    rows = ticks(low, high, max(2, (bottom - top) // 45))
    left = max([MARGIN_LEFT, *(10 + CHARACTER * len(label(tick)) for tick in rows)])
    first, last = 0.0, max(float(steps.max()), 1.0)

    def across(step):
        return left + (step - first) / (last - first) * (right - left)

    def up(value):
        return bottom - (value - low) / (high - low) * (bottom - top)

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(describe(series, values))}">'
    ]
    for tick in rows:
        y = up(tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 3.5:.1f}" text-anchor="end">{label(tick)}</text>')
    for tick in ticks(first, last, max(2, (right - left) // 70)):
        x = across(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label(tick)}</text>')
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    parts.append(f'<text class="tick" x="{(left + right) / 2:.1f}" y="{height - 6}" text-anchor="middle">step</text>')
    course = smooth(values) if series.smoothed else values
    if series.smoothed:
        parts.append(f'<path class="raw" d="{line_path(across(steps), up(values))}"/>')
    else:
        points = zip(across(steps), up(values), strict=True)
        parts += [f'<circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points]
    parts.append(f'<path class="course" d="{line_path(across(steps), up(course))}"/>')
    parts.append(f'<circle class="end" cx="{across(steps[-1]):.1f}" cy="{up(course[-1]):.1f}" r="2.6"/>')
    parts.append(
        f'<text class="value" x="{across(steps[-1]) + 7:.1f}" y="{up(course[-1]) + 4:.1f}">{number(course[-1])}</text>'
    )
    return "".join(parts) + "</svg>"


def number(value: float) -> str:
    """Three significant digits; an exponent below 0.001."""
    return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:#.3g}".rstrip(".")


def describe(series: Series, values: np.ndarray) -> str:
    unit = f" {series.unit}" if series.unit else ""
    return f"{series.title}: from {number(values[0])} to {number(values[-1])}{unit} in {len(values)} logged steps"


def outline_path(mask: np.ndarray) -> str:
    """The border of a mask [h, w] bool as a path in pixel units, of runs of pixel edges between inside and outside."""
    padded = np.pad(mask, 1)
    across = padded[1:, 1:-1] != padded[:-1, 1:-1]  # [h + 1, w]: edge above pixel (y, x)
    down = (padded[1:-1, 1:] != padded[1:-1, :-1]).T  # [w + 1, h]: edge left of pixel (y, x)
    rows = [f"M{start} {y}h{length}" for y, start, length in runs(across)]
    columns = [f"M{x} {start}v{length}" for x, start, length in runs(down)]
    return "".join(rows + columns)


def runs(edges: np.ndarray) -> Sequence[tuple[int, int, int]]:
    """(row, start, length) of every run of True along the rows of a matrix."""
    change = np.diff(np.pad(edges, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    lines, starts = np.nonzero(change == 1)
    ends = np.nonzero(change == -1)[1]
    return list(zip(lines.tolist(), starts.tolist(), (ends - starts).tolist(), strict=True))
