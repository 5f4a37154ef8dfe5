"""Figures over time as inline SVG: panels one below the other that share their x axis, one line an arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["over_time"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 190, 44, 12, 26, 22
COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1")

Line = Sequence[tuple[float, float]]  # (x, y), x ascending


def over_time(
    panels: Mapping[str, Mapping[str, Line]], *, title: str, x_label: str, marks: Mapping[str, float] | None = None,
) -> str:
    """``<svg>``: ``panels`` name -> line name -> points; ``marks``: what happened at which x, across all panels.

    Raises ValueError where there is nothing to draw.
    """
    points = [p for lines in panels.values() for line in lines.values() for p in line]
    if not points:
        raise ValueError("no point to draw")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    most, height = max(x for x, _ in points) or 1.0, HEIGHT * len(panels) + 24
    body = [
        f'<g transform="translate(0 {i * HEIGHT})">{_panel(name, lines, names, most, marks or {})}</g>'
        for i, (name, lines) in enumerate(panels.items())
    ]
    for i, name in enumerate(names):
        color, x, y = COLORS[i % len(COLORS)], LEFT + 110 * i, height - 6
        body.append(f'<path d="M{x} {y - 4}h18" stroke="{color}" stroke-width="2"/><text x="{x + 24}" y="{y}">'
                    f"{escape(name)}</text>")
    body.append(f'<text x="{WIDTH - RIGHT}" y="{height - 6}" text-anchor="end">{escape(x_label)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(title)}" style="font:11px system-ui,sans-serif;fill:currentColor"><title>'
        f"{escape(title)}</title>" + "".join(body) + "</svg>"
    )


def _panel(
    name: str, lines: Mapping[str, Line], names: Sequence[str], most: float, marks: Mapping[str, float]
) -> str:
    top = 1.08 * max((y for line in lines.values() for _, y in line), default=1.0) or 1.0

    def x(v: float) -> float:
        return LEFT + v / most * (WIDTH - LEFT - RIGHT)

    def y(v: float) -> float:
        return HEIGHT - BOTTOM - v / top * (HEIGHT - BOTTOM - TOP)

    out = [f'<text x="{LEFT}" y="14" font-weight="600">{escape(name)}</text>']
    for i in range(5):
        v = top / 1.08 * i / 4
        out.append(f'<path d="M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity=".15"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>')
        out.append(f'<text x="{x(most * i / 4):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{most * i / 4:.0f}</text>')
    for what, at in marks.items():
        out.append(f'<path d="M{x(at):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="currentColor" stroke-dasharray="4 3"/>')
        left = at > 0.85 * most
        place = f'x="{x(at) + (-4 if left else 4):.1f}" y="{TOP + 9}" text-anchor="{"end" if left else "start"}"'
        out.append(f"<text {place}>{escape(what)}</text>")
    for line_name, line in lines.items():
        color = COLORS[names.index(line_name) % len(COLORS)]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        out += [
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5" fill="{color}"><title>{escape(line_name)}: {b:.3g} at '
            f"{a:g}</title></circle>" for a, b in line
        ]
    return "".join(out)
