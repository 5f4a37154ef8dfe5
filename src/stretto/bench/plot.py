"""The speed-quality plot as inline SVG: one point a method, whiskers over rounds, labels that never overlap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from stretto.bench.summary import is_base, title

__all__ = ["speed_quality"]

X_TICKS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)
CHAR, LINE = 7.3, 17.0  # width and height in px of a letter of the labels
HEAD = 84.0  # room above 100 % for the labels of methods that get everything right


Line = tuple[float, float, float, float]  # x, y of its two ends


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle that a label must not cover."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right
            and self.top < other.bottom and other.top < self.bottom
        )


@dataclass(frozen=True, slots=True)
class Point:
    label: str
    kind: str  # "base", "same" (lossless) or "lossy"
    x: float
    low: float
    high: float
    y: float
    text: str  # for the tooltip


class Frame:
    """The plotting area and its two scales: speed-up (logarithmic) and share of right answers (linear)."""

    def __init__(self, points: Sequence[Point], width: int, height: int):
        self.width, self.height = width, height
        self.left, self.right, self.top, self.bottom = 52.0, width - 16.0, 12.0, height - 50.0
        low = min(0.85, *(p.low for p in points))
        high = max(1.6, *(p.high for p in points))
        self._x0, self._x1 = math.log(low / 1.06), math.log(high * 1.12)
        floor, best = min(p.y for p in points), max(p.y for p in points)
        self.y0 = max(0.0, math.floor(min(floor - 0.02, 0.9) * 10) / 10)
        self.head = HEAD * max(0.15, 1 - 3 * (1 - best) / (1 - self.y0))

    def x(self, value: float) -> float:
        return self.left + (math.log(value) - self._x0) / (self._x1 - self._x0) * (self.right - self.left)

    def y(self, value: float) -> float:
        top = self.top + self.head
        return self.bottom - (value - self.y0) / (1.0 - self.y0) * (self.bottom - top)

    @property
    def x_ticks(self) -> list[float]:
        inside = [t for t in X_TICKS if self.left - 1 <= self.x(t) <= self.right + 1]
        kept: list[float] = []
        for tick in sorted(inside, key=lambda t: (t != 1, t not in (0.5, 2, 4, 8, 16), t)):
            if all(abs(self.x(tick) - self.x(k)) > 34 for k in kept):
                kept.append(tick)
        return sorted(kept)

    @property
    def y_ticks(self) -> list[float]:
        span = 1.0 - self.y0
        step = 0.02 if span <= 0.11 else 0.05 if span <= 0.31 else 0.1 if span <= 0.6 else 0.2
        return [t for i in range(51) if (t := 1.0 - i * step) >= self.y0 - 1e-9]


def speed_quality(result: Mapping[str, Any], *, width: int = 760, height: int = 420) -> str:
    """``<svg>`` of the totals of ``result``; "" where no answer can be scored."""
    points = _points(result)
    if not points:
        return ""
    frame = Frame(points, width, height)
    marks = sorted(points, key=lambda p: p.kind == "base")
    body = [_axes(frame), *(_mark(frame, p) for p in marks), *_labels(frame, points)]
    summary = "; ".join(p.text for p in points)
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="Speed against quality. '
        f'{escape(summary, quote=True)}">' + "".join(body) + "</svg>"
    )


def _points(result: Mapping[str, Any]) -> list[Point]:
    out = []
    for row in result["totals"]:
        if row["quality"] is None:
            continue
        name = title(result, row)
        kind = "base" if is_base(result, row) else "same" if row["lossless"] else "lossy"
        text = f"{name}: {row['speedup']:.2f} times plain decoding, {row['quality']:.1%} right"
        label = row["method"] + ("" if row["model"] == result["model"] else f" · {row['model'].removeprefix('zoo:')}")
        out.append(
            Point(label, kind, row["speedup"], row["speedup_low"], row["speedup_high"], row["quality"], text)
        )
    return out


def _axes(f: Frame) -> str:
    out = []
    for t in f.y_ticks:
        y = f.y(t)
        out.append(f'<line class="grid" x1="{f.left}" x2="{f.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{f.left - 8}" y="{y + 4:.1f}" text-anchor="end">{t * 100:.0f}</text>')
    for t in f.x_ticks:
        x = f.x(t)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{f.bottom}" y2="{f.bottom + 5}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{f.bottom + 19}" text-anchor="middle">{t:g}×</text>')
    one, middle = f.x(1), (f.left + f.right) / 2
    out.append(f'<line class="one" x1="{one:.1f}" x2="{one:.1f}" y1="{f.top}" y2="{f.bottom}"/>')
    out.append(
        f'<text class="axis" x="{middle:.0f}" y="{f.height - 8}" text-anchor="middle">'
        f"speed-up over plain decoding ({'wall-clock time, ' if f.width > 500 else ''}log scale) →</text>"
    )
    out.append(
        f'<text class="axis" transform="translate(14 {(f.y(1) + f.bottom) / 2:.0f}) rotate(-90)" '
        'text-anchor="middle">answers right (%)</text>'
    )
    return "".join(out)


def _mark(f: Frame, p: Point) -> str:
    x, y = f.x(p.x), f.y(p.y)
    whisker = f'<line class="whisker {p.kind}" x1="{f.x(p.low):.1f}" x2="{f.x(p.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    shape = (
        f'<path class="mark lossy" d="M{x:.1f} {y - 7:.1f}l7 7-7 7-7-7z"/>' if p.kind == "lossy"
        else f'<circle class="mark {p.kind}" cx="{x:.1f}" cy="{y:.1f}" r="{5 if p.kind == "base" else 6}"/>'
    )
    return f"<g><title>{escape(p.text)}</title>{whisker}{shape}</g>"


def _labels(f: Frame, points: Sequence[Point]) -> list[str]:
    """Each label goes to the nearest free place around its point; one further away gets a thin leader."""
    taken = [Box(f.x(p.x) - 8, f.y(p.y) - 8, f.x(p.x) + 8, f.y(p.y) + 8) for p in points]
    taken += [Box(f.x(p.low), f.y(p.y) - 2, f.x(p.high), f.y(p.y) + 2) for p in points]
    labels: list[Box] = []
    leaders: list[Line] = []
    texts = []
    for p in sorted(points, key=lambda p: (-p.y, p.x)):
        x, y = f.x(p.x), f.y(p.y)
        box = _place(f, x, y, len(p.label) * CHAR, taken + labels, labels, leaders)
        labels.append(box)
        leaders += _leader(x, y, box)
        middle, base = (box.left + box.right) / 2, (box.top + box.bottom) / 2 + 4
        texts.append(
            f'<text class="label {p.kind}" x="{middle:.1f}" y="{base:.1f}" text-anchor="middle">'
            f"{escape(p.label)}</text>"
        )
    lines = [f'<path class="leader" d="M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}"/>' for a, b, c, d in leaders]
    return lines + texts


def _leader(x: float, y: float, label: Box) -> list[Line]:
    """The line from the edge of a point to the nearest edge of its label, if that is not right beside the point."""
    end_x = min(max(x, label.left + 3), label.right - 3)
    end_y = label.bottom if label.bottom < y else label.top if label.top > y else y
    away = math.hypot(end_x - x, end_y - y)
    if away < LINE:
        return []
    return [(x + (end_x - x) * 8 / away, y + (end_y - y) * 8 / away, end_x, end_y)]


def _crosses(line: Line, box: Box) -> bool:
    """Whether a segment passes through a box (sampled every two pixels or so)."""
    a, b, c, d = line
    n = max(2, int(math.hypot(c - a, d - b) / 2))
    return any(
        box.left < a + (c - a) * i / n < box.right and box.top < b + (d - b) * i / n < box.bottom for i in range(n)
    )


def _place(
    f: Frame, x: float, y: float, w: float, taken: Sequence[Box], labels: Sequence[Box], leaders: Sequence[Line]
) -> Box:
    """The nearest free place whose leader crosses no label, nor its text another's leader."""
    shifts = [0.0, *(s * (w / 2 + d) for d in (-6, 12, 36, 72, 110) for s in (1, -1))]
    heights = [0.0, *(s * (17 + step * LINE) for step in range(9) for s in (-1, 1))]
    spots = [(dx, dy) for dy in heights for dx in shifts if dy or abs(dx) > w / 2]
    for dx, dy in sorted(spots, key=lambda s: abs(s[0]) * (0.6 if s[1] else 1.2) + abs(s[1]) + (s[1] > 0)):
        cx, cy = min(max(x + dx, f.left + w / 2 + 2), f.right - w / 2), y + dy
        box = Box(cx - w / 2, cy - LINE / 2, cx + w / 2, cy + LINE / 2)
        wide = Box(box.left - 4, box.top, box.right + 4, box.bottom)
        free = not any(wide.meets(t) for t in taken) and not any(_crosses(line, wide) for line in leaders)
        clear = not any(_crosses(line, b) for line in _leader(x, y, box) for b in labels)
        if free and clear and f.top - 4 <= box.top and box.bottom <= f.bottom - 2:
            return box
    return Box(x - w / 2, y - 1.5 * LINE, x + w / 2, y - LINE / 2)
