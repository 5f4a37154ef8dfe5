"""A load run in the terminal, and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from stretto.bench.provenance import write_atomically

__all__ = ["print_load", "render_load", "write_load"]

ROWS = (
    ("ttft_ms", "time to first text (TTFT)"), ("tpot_ms", "time per further token (TPOT)"),
    ("itl_ms", "between two pieces (ITL)"), ("e2e_ms", "whole request (E2E)"),
)
COLUMNS = ("mean", "median", "p90", "p99", "max")


def headline(result: Mapping[str, Any]) -> str:
    """The run in a sentence."""
    text = (
        f"{result['completed']} of {result['requests']} requests in {result['seconds']:.1f} s: "
        f"{result['requests_per_second']:.2f} requests and {result['tokens_per_second']:.1f} tokens a second"
    )
    if result["goodput"] is not None:
        limits = ", ".join(f"{k} {v:g} ms" for k, v in result["limits_ms"].items())
        text += f"; {result['goodput']:.2f} requests a second met {limits}"
    return text + "."


def print_load(result: Mapping[str, Any]) -> None:
    """Tables on stdout."""
    print(headline(result))
    print(f"{'milliseconds':<32}" + "".join(f"{c:>10}" for c in COLUMNS))
    for key, name in ROWS:
        found = result[key]
        cells = "".join(f"{found[c]:>10.1f}" for c in COLUMNS) if found else f"{'-':>10}"
        print(f"{name:<32}{cells}")
    for reason, count in result["errors"].items():
        print(f"failed, {count} times: {reason}")


def write_load(result: Mapping[str, Any], path: str | Path) -> Path:
    """The page, written in one go; its path."""
    return write_atomically(path, render_load(result))


def render_load(result: Mapping[str, Any]) -> str:
    """The page: figures, and one bar a request over time (grey: waiting; colour: text)."""
    style = Path(__file__).with_name("report_style.html").read_text(encoding="utf-8")
    head = "".join(f"<th scope=col>{c}</th>" for c in COLUMNS)
    rows = []
    for key, name in ROWS:
        found = result[key]
        cells = "".join(f"<td>{found[c]:.1f}</td>" for c in COLUMNS) if found else "<td colspan=5>none</td>"
        rows.append(f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>")
    failed = "".join(f"<li>{count} times: {escape(reason)}</li>" for reason, count in result["errors"].items())
    origin = ", ".join(f"{k} {v}" for k, v in result["provenance"].items())
    title = f"load on {result['url']}"
    sent = f"{result['model']}, {result['arrivals']} arrivals, {result['rate']:g} a second, body {dict(result['body'])}"
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>"
        f'<meta name=viewport content="width=device-width, initial-scale=1">{style}'
        "<style>table{border-collapse:collapse}td,th{padding:4px 12px;text-align:right}th[scope=row]{text-align:left}"
        ".wait{fill:var(--line)}.work{fill:var(--accent)}</style></head><body><main>"
        f"<h1>{escape(title)}</h1><p class=lead>{escape(headline(result))}</p><p>{escape(sent)}</p>"
        f"<table><thead><tr><th>milliseconds</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        + (f"<h2>Failed</h2><ul>{failed}</ul>" if failed else "")
        + f"<section><h2>Requests over time</h2>{_bars(result)}</section>"
        f"<p class=small>{escape(origin)}</p></main></body></html>"
    )


def _bars(result: Mapping[str, Any], width: int = 960) -> str:
    lines = result["timeline"]
    if not lines:
        return "<p>none was answered</p>"
    span = max(line[3] for line in lines) or 1.0
    height = max(2.0, min(10.0, 480 / len(lines)))
    parts = []
    for i, (_, sent, first, end) in enumerate(lines):
        x, y, z = (width * t / span for t in (sent, first, end))
        top = i * (height + 1)
        parts.append(
            f'<rect class="wait" x="{x:.1f}" y="{top:.1f}" width="{max(0.5, y - x):.1f}" height="{height:.1f}"/>'
            f'<rect class="work" x="{y:.1f}" y="{top:.1f}" width="{max(0.5, z - y):.1f}" height="{height:.1f}"/>'
        )
    total = len(lines) * (height + 1)
    return (
        f'<svg viewBox="0 0 {width} {total:.0f}" width="100%" role="img" aria-label="{len(lines)} requests over '
        f'{span:.1f} seconds">{"".join(parts)}</svg><p class=small>0 to {span:.1f} s; grey: until the first text</p>'
    )
