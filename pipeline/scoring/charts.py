"""Charts as inline SVG: intervals side by side, stacked bars, and curves.

Pure text in, pure text out; colours come from the page.

Every mark carries a `<title>`, so pointing at it tells its figures; nothing is said by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 510
ROW = 26


@dataclass(frozen=True)
class Mark:
    """A value with its interval; `colour` is a CSS class of the page (base, sft, grpo, plain)."""

    label: str
    value: float
    low: float
    high: float
    colour: str


@dataclass(frozen=True)
class Series:
    label: str
    points: tuple[tuple[float, float], ...]  # (x, y), x ascending
    colour: str


@dataclass(frozen=True)
class Bar:
    """A bar of parts, from left to right: (name, value), no value below 0 and not all of them 0."""

    label: str
    parts: tuple[tuple[str, float], ...]

    @property
    def total(self) -> float:
        return sum(value for _, value in self.parts)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that cover low … high."""
    scale = max(abs(low), abs(high), 1e-9)
    span = high - low if high - low > 1e-9 * scale else scale
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.floor(low / step + 1e-9) * step
    count = max(1, math.ceil((high - first) / step - 1e-9))
    return [round(first + k * step, 10) for k in range(count + 1)]


def number(value: float) -> str:
    """Short, without a needless zero: 0.25, 3, 1200, 1e-06."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def intervals(
    marks: Sequence[Mark],
    low: float,
    high: float,
    *,
    lines: Sequence[tuple[float, str]] = (),
    signed: bool = False,
    title: str = "",
) -> str:
    """One row a mark: a dot with its interval. `lines` are vertical references (value, label)."""
    grid = ticks(low, high)
    low, high = min(low, grid[0]), max(high, grid[-1])
    left, right, top = 190, 72, 24
    inner = WIDTH - left - right
    height = top + ROW * len(marks) + 30

    def x(value: float) -> float:
        return left + inner * (min(max(value, low), high) - low) / (high - low)

    out = [_open(WIDTH, height, title)]
    bottom = top + ROW * len(marks) + 4
    for tick in grid:
        out.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top - 6}" y2="{bottom}"/>')
        out.append(_tick(x(tick), bottom + 16, number(tick)))
    for value, label in lines:
        out.append(f'<line class="reference" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top - 8}" y2="{bottom}"/>')
        out.append(_tick(x(value), top - 11, label))
    for k, mark in enumerate(marks):
        y = top + ROW * k + ROW / 2
        told = f"{mark.value:+.3f}" if signed else f"{mark.value:.3f}"
        out.append(
            f'<g class="{mark.colour}"><title>{escape(mark.label)}: {told} ({mark.low:.3f} … {mark.high:.3f})</title>'
            f'<text class="label" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(mark.label)}</text>'
            f'<line class="bar" x1="{x(mark.low):.1f}" x2="{x(mark.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle cx="{x(mark.value):.1f}" cy="{y:.1f}" r="5"/>'
            f'<text class="value" x="{WIDTH - right + 14}" y="{y + 4:.1f}">{told}</text></g>'
        )
    return "".join([*out, "</svg>"])


def stacked(bars: Sequence[Bar], names: Sequence[str], *, title: str, unit: str) -> str:
    """One row a bar, its parts from left to right, with a legend; each part tells its value and its share.

    `names`: those of all parts, as the legend lists them.
    """
    grid = ticks(0.0, max((bar.total for bar in bars), default=0.0))
    left, right, columns = 190, 72, 4
    inner, legend = WIDTH - left - right, 20 * math.ceil(len(names) / columns)
    top = legend + 12
    bottom = top + ROW * len(bars) + 4
    out = [_open(WIDTH, bottom + 42, title)]
    for k, name in enumerate(names):
        x, y = WIDTH / columns * (k % columns), 20 * (k // columns) + 4
        out.append(f'<rect class="{_part(name)}" x="{x:.1f}" y="{y}" width="11" height="11" rx="2"/>')
        out.append(f'<text class="tick" x="{x + 16:.1f}" y="{y + 10}">{escape(name)}</text>')
    for tick in grid:
        x = left + inner * tick / grid[-1]
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{bottom}"/>')
        out.append(_tick(x, bottom + 16, number(tick)))
    out.append(_tick(left + inner / 2, bottom + 34, unit))
    for k, bar in enumerate(bars):
        y, x = top + ROW * k, float(left)
        label = escape(bar.label)
        out.append(f'<text class="label" x="{left - 12}" y="{y + ROW / 2 + 4:.1f}" text-anchor="end">{label}</text>')
        for name, value in bar.parts:
            width = inner * value / grid[-1]
            told = f"{label}, {escape(name)}: {number(value)} {unit} ({100 * value / bar.total:.0f} %)"
            out.append(
                f'<rect class="{_part(name)}" x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="{ROW - 8}">'
                f"<title>{told}</title></rect>"
            )
            x += width
        out.append(f'<text class="value" x="{x + 8:.1f}" y="{y + ROW / 2 + 4:.1f}">{number(bar.total)}</text>')
    return "".join([*out, "</svg>"])


def _part(name: str) -> str:
    """The CSS class of a part: its colour."""
    return f"part-{name.replace('/', '-')}"


def curves(series: Sequence[Series], *, title: str, x_label: str = "step", from_zero: bool = True) -> str:
    """Lines over x, each named at its end."""
    shown = [s for s in series if s.points]
    if not shown:
        return ""
    xs = [x for s in shown for x, _ in s.points]
    ys = [y for s in shown for _, y in s.points]
    y_ticks = ticks(min(0.0, *ys) if from_zero else min(ys), max(ys))
    x_ticks = ticks(0, max(xs))
    low, high = y_ticks[0], y_ticks[-1]
    width, height, left, right, top, bottom = 310, 220, 46, 16, 34, 44

    def px(x: float) -> float:
        return left + (width - left - right) * x / (x_ticks[-1] or 1)

    def py(y: float) -> float:
        return height - bottom - (height - top - bottom) * (y - low) / ((high - low) or 1)

    out = [_open(width, height, title), f'<text class="label" x="{left}" y="16">{escape(title)}</text>']
    for tick in y_ticks:
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        out.append(f'<text class="tick" x="{left - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        out.append(_tick(px(tick), height - bottom + 16, number(tick)))
    out.append(_tick((left + width - right) / 2, height - 8, x_label))
    for s in shown:
        path = " ".join(f"{'M' if k == 0 else 'L'}{px(x):.1f} {py(y):.1f}" for k, (x, y) in enumerate(s.points))
        last = s.points[-1]
        out.append(
            f'<g class="{s.colour}"><title>{escape(s.label)}: {number(last[1])} at {number(last[0])}</title>'
            f'<path d="{path}"/><circle cx="{px(last[0]):.1f}" cy="{py(last[1]):.1f}" r="3"/></g>'
        )
    return "".join([*out, "</svg>"])


def _tick(x: float, y: float, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:g}" text-anchor="middle">{escape(text)}</text>'


def _open(width: float, height: float, title: str) -> str:
    return f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(title, quote=True)}">'
