"""The speed-quality picture of a ParallelBench sweep as inline SVG: one panel a task, score over tokens per forward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["panels", "sweep_page"]

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 240, 170, 34, 26, 22
COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")
STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "svg{max-width:100%;height:auto}table{border-collapse:collapse}"
    "td,th{padding:.15rem .6rem;text-align:left;border-bottom:1px solid #8884}"
)
TICKS = (1, 2, 4, 8, 16, 32)


def panels(result: Mapping[str, Any], *, columns: int = 3) -> str:
    """``<svg>`` with a panel for every task of a sweep; lines join the settings of one rule, bars are two standard
    errors; the dashed line is the score that the parallel budget at 80 % asks for."""
    tasks = list(result["tasks"])
    rules = list(dict.fromkeys(_rule(p["decoder"]) for p in result["points"]))
    most = max(2.0, *(p["tokens_per_forward"] for p in result["points"]))
    rows = -(-len(tasks) // columns)
    width, height = columns * WIDTH, rows * HEIGHT + 24 * (1 + len(rules) // 6)
    body = []
    for i, task in enumerate(tasks):
        x, y = i % columns * WIDTH, i // columns * HEIGHT
        mine = [p for p in result["points"] if p["task"] == task]
        body.append(f'<g transform="translate({x} {y})">{_panel(task, mine, rules, most)}</g>')
    for i, rule in enumerate(rules):
        x, y = 12 + i % 6 * (width - 12) // 6, rows * HEIGHT + 16 + 20 * (i // 6)
        color = COLORS[i % len(COLORS)]
        body.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{color}"/>')
        body.append(f'<text x="{x + 8}" y="{y}">{escape(rule)}</text>')
    label = f"Score against tokens per forward on {len(tasks)} tasks"
    style = "font:11px system-ui,sans-serif;fill:currentColor"
    return (
        f'<svg class="panels" viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{label}" '
        f'style="{style}">' + "".join(body) + "</svg>"
    )


def _rule(decoder: str) -> str:
    """"static confidence B8 S4" -> "static confidence": the settings of one line."""
    return " ".join(w for w in decoder.split() if not w[-1].isdigit())


def _panel(task: str, points: Sequence[Mapping[str, Any]], rules: Sequence[str], most: float) -> str:
    def x(v: float) -> float:
        return LEFT + math.log(max(v, 1.0)) / math.log(most) * (WIDTH - LEFT - 14)

    def y(v: float) -> float:
        return HEIGHT - BOTTOM - v * (HEIGHT - BOTTOM - TOP)

    out = [f'<text x="{LEFT}" y="13" font-weight="600">{escape(task)}</text>']
    for v in (0.0, 0.5, 1.0):
        out.append(f'<text x="{LEFT - 6}" y="{y(v) + 4:.0f}" text-anchor="end">{v:.0%}</text>')
        out.append(_line(x(1), y(v), x(most), y(v), 'stroke="currentColor" stroke-opacity=".2"'))
    dashed = 'stroke="currentColor" stroke-opacity=".45" stroke-dasharray="3 3"'
    out.append(_line(x(1), y(0.8), x(most), y(0.8), dashed))
    for v in TICKS:
        if v <= most * 1.01:
            out.append(f'<text x="{x(v):.0f}" y="{HEIGHT - 10}" text-anchor="middle">{v}</text>')
    for i, rule in enumerate(rules):
        color = COLORS[i % len(COLORS)]
        mine = sorted((p for p in points if _rule(p["decoder"]) == rule), key=lambda p: p["tokens_per_forward"])
        path = " ".join(f"{x(p['tokens_per_forward']):.1f},{y(p['score']):.1f}" for p in mine)
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        for p in mine:
            cx, low, high = x(p["tokens_per_forward"]), p["score"] - 2 * p["stderr"], p["score"] + 2 * p["stderr"]
            title = f"{p['decoder']}: {p['score']:.1%} at {p['tokens_per_forward']:.2f} tokens a forward, n = {p['n']}"
            out.append(_line(cx, y(max(low, 0)), cx, y(min(high, 1)), f'stroke="{color}" stroke-opacity=".5"'))
            out.append(f'<circle cx="{cx:.1f}" cy="{y(p["score"]):.1f}" r="3" fill="{color}"><title>{escape(title)}'
                       "</title></circle>")
    return "".join(out)


def _line(x0: float, y0: float, x1: float, y1: float, style: str) -> str:
    return f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" fill="none" {style}/>'


def sweep_page(result: Mapping[str, Any]) -> str:
    """One self-contained HTML page: the picture and the table it was drawn from."""
    head = ("decoder", "task", "n", "score", "stderr", "tokens_per_forward", "forwards", "kendall")
    rows = "".join(
        "<tr>" + "".join(f"<td>{_cell(p[k])}</td>" for k in head) + "</tr>" for p in result["points"]
    )
    names = "".join(f"<th>{k.replace('_', ' ')}</th>" for k in head)
    budgets = "".join(
        f"<tr><td>{escape(t)}</td>" + "".join(f"<td>{_cell(v)}</td>" for v in s.values()) + "</tr>"
        for t, s in result["tasks"].items()
    )
    title = f"ParallelBench: {escape(result.get('model', ''))}"
    return (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1><p>Score over tokens per forward; bars are two standard errors.</p>{panels(result)}"
        "<h2>How far one may go</h2><table><tr><th>task</th><th>budget at 80 %</th><th>at 90 %</th><th>oracle</th>"
        f"<th>solved by some setting</th></tr>{budgets}</table>"
        f"<h2>All settings</h2><table><tr>{names}</tr>{rows}</table>"
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else escape(str(value))
