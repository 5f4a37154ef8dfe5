"""The tables of the report as HTML; every text that comes from outside is escaped here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from stretto.bench.summary import best_lossless, is_base, title

__all__ = ["facts", "figures", "matrix", "notes", "origin", "peers_section", "scopes", "totals"]

Row = Mapping[str, Any]
Result = Mapping[str, Any]

COLUMNS = (  # heading, key, sorted upwards first
    ("speed-up", "speedup", False), ("tokens per<br>forward", "tokens_per_forward", False),
    ("same<br>text", "equal", False), ("answers<br>right", "quality", False), ("accept-<br>ance", "acceptance", False),
    ("forwards<br>per answer", "forwards", True), ("rows per<br>forward", "rows_per_forward", True),
    ("ms per<br>token", "seconds_per_token", True),
)
METRICS = (
    ("speedup", "speed-up"), ("tokens_per_forward", "tokens per forward"), ("equal", "same text"),
    ("quality", "answers right"),
)


def facts(result: Result) -> str:
    """What was measured, as short list items."""
    p = result["provenance"]
    methods, tasks = len(result["totals"]), len(p["tasks"])
    threads = p.get("threads", "?")
    items = [
        f"{methods} methods × {tasks} tasks × {p['samples']} prompts", f"batch {p['batch']}, greedy",
        f"{p.get('dtype', '')}, {p.get('backend', '')} backend",
        f"{threads} thread{'' if threads == 1 else 's'}, {p['cpu']}",
        "deterministic mode" if p.get("deterministic") else "default mode", p["date"][:10],
    ]
    return "".join(f"<li>{escape(i)}</li>" for i in items)


def totals(result: Result) -> str:
    """One line a method over all tasks, the speed-up as a bar with its spread."""
    rows = sorted(result["totals"], key=lambda r: -r["speedup"])
    best = best_lossless(result, rows)
    end = max(r["speedup_high"] for r in rows) * 1.02
    body = "".join(_total(result, r, best, end) for r in rows)
    columns = [c for c in COLUMNS if c[1] not in ("rows_per_forward",)]
    return (
        '<div class="card scroll" tabindex="0" role="region" aria-label="Methods over all tasks"><table data-sort>'
        f"<thead><tr>{_head('method', '', True)}{''.join(_head(h, k, up) for h, k, up in columns)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _total(result: Result, row: Row, best: Row | None, end: float) -> str:
    base = is_base(result, row)
    kind = "base" if base else "best" if row is best else ""
    tag = '<span class="tag">best lossless</span>' if row is best else ""
    under = _under(result, row)
    cells = [
        f'<th scope="row"><span class="mono">{escape(row["method"])}</span>{tag}<small>{under}</small></th>',
        f'<td class="wide" data-v="{row["speedup"]:.4f}">{_gauge(row, end, base)}</td>',
    ]
    cells += [_cell(row, key) for _, key, _ in COLUMNS[1:] if key != "rows_per_forward"]
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _under(result: Result, row: Row) -> str:
    if is_base(result, row):
        return "plain decoding, the baseline"
    if row["model"] != result["model"]:
        return f"on {escape(row['model'])}"
    return "lossless" if row["lossless"] else "may change the text"


def _gauge(row: Row, end: float, base: bool) -> str:
    kind = "flat" if base or row["speedup"] < 1.0 else "" if row["lossless"] else "lossy"
    low, high = row["speedup_low"] / end * 100, row["speedup_high"] / end * 100
    return (
        f'<div class="gauge" title="{row["speedup_low"]:.2f} to {row["speedup_high"]:.2f} over the rounds">'
        f'<b>{row["speedup"]:.2f}×</b><span class="track"><s style="left:{100 / end:.2f}%"></s>'
        f'<i class="{kind}" style="width:{row["speedup"] / end * 100:.2f}%"></i>'
        f'<u style="left:{low:.2f}%;width:{max(high - low, 0.3):.2f}%"></u></span></div>'
    )


def _head(text: str, key: str, up: bool) -> str:
    order = "descending" if key == "speedup" else "none"
    first = ' data-first="up"' if up else ""
    return f'<th scope="col" aria-sort="{order}"{first}><button type="button">{text}</button></th>'


FORMATS: dict[str, Callable[[float], str]] = {
    "speedup": lambda v: f"{v:.2f}×", "tokens_per_forward": lambda v: f"{v:.2f}", "equal": lambda v: f"{v:.0%}",
    "quality": lambda v: f"{v:.0%}", "acceptance": lambda v: f"{v:.0%}", "forwards": lambda v: f"{v:.1f}",
    "rows_per_forward": lambda v: f"{v:.1f}", "seconds_per_token": lambda v: f"{v * 1000:.2f}", "n": lambda v: f"{v}",
}


def _cell(row: Row, key: str) -> str:
    value = row[key]
    if value is None:
        return '<td class="na" data-v="">–</td>'
    kind = ("yes" if value == 1 else "no") if key == "equal" else ""
    return f'<td class="{kind}" data-v="{value:.6g}">{FORMATS[key](value)}</td>'


def notes(result: Result) -> str:
    """What methods said about themselves, and what was left out."""
    lines = []
    for row in result["totals"]:
        lines += [f"<b>{escape(title(result, row))}</b> {escape(n)}" for n in row["notes"]]
    lines += [
        f"<b>{escape(s['method'])}</b> on {escape(s['model'])} was left out: {escape(s['reason'])}"
        for s in result["skipped"]
    ]
    return f'<ul class="notes small">{"".join(f"<li>{x}</li>" for x in lines)}</ul>' if lines else ""


def matrix(result: Result) -> str:
    """Methods against families, one table for each figure, the best lossless speed-up of a family framed."""
    families = list(dict.fromkeys(r["family"] for r in result["families"]))
    if len(families) < 2:
        return ""
    pills = "".join(
        f'<button type="button" value="{key}" aria-pressed="{str(i == 0).lower()}">{name}</button>'
        for i, (key, name) in enumerate(METRICS)
    )
    tables = "".join(_matrix(result, families, key, name, i > 0) for i, (key, name) in enumerate(METRICS))
    return (
        '<section aria-labelledby="h-matrix"><h2 id="h-matrix">Where it pays</h2>'
        '<p class="sub">The same methods on each kind of work. A frame marks the fastest lossless method of a column.'
        "</p>"
        f'<div class="bar"><div class="pills" data-switch="matrix" role="group" aria-label="Figure">{pills}</div></div>'
        f"{tables}</section>"
    )


def _matrix(result: Result, families: list[str], key: str, name: str, hidden: bool) -> str:
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in result["families"]:
        groups.setdefault((row["model"], row["method"]), {})[row["family"]] = row
    best = {f: best_lossless(result, [r for r in result["families"] if r["family"] == f]) for f in families}
    body = ""
    for found in groups.values():
        first = next(iter(found.values()))
        cells = "".join(_shade(found.get(f), key, found.get(f) is best[f] and key == "speedup") for f in families)
        small = "" if first["model"] == result["model"] else f"<small>on {escape(first['model'])}</small>"
        body += f'<tr><th scope="row"><span class="mono">{escape(first["method"])}</span>{small}</th>{cells}</tr>'
    head = "".join(f'<th scope="col">{escape(f)}</th>' for f in families)
    return (
        f'<div class="card scroll" data-group="matrix" data-value="{key}" tabindex="0" role="region" '
        f'aria-label="{name} by kind of work"{" hidden" if hidden else ""}><table class="matrix"><thead><tr>'
        f'<th scope="col">method</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _shade(row: Row | None, key: str, top: bool) -> str:
    """A cell whose tint says how far from plain decoding: green gains, red loses."""
    if row is None or row[key] is None:
        return '<td class="na">–</td>'
    value = row[key]
    if key in ("equal", "quality"):
        share, colour = (value - 0.5) * 80, "good"
    else:
        gain = value - 1
        share, colour = (min(gain / 2.5, 1) * 55, "good") if gain > 0.03 else (min(-gain * 2, 1) * 45, "bad")
    tint = f"background:color-mix(in srgb, var(--{colour}) {max(share, 0):.0f}%, transparent)"
    return f'<td class="{"top" if top else ""}" style="{tint}">{FORMATS[key](value)}</td>'


def scopes(result: Result) -> str:
    """The choices of the filter above all figures."""
    names = dict.fromkeys(r["task"] for r in result["rows"])
    return "".join(f'<option value="{escape(n)}">{escape(n)}</option>' for n in names)


def figures(result: Result) -> str:
    """Every method on every task."""
    names = "".join(_head(n, "", True) for n in ("method", "task"))
    head = names + "".join(_head(*c) for c in COLUMNS) + _head("n", "", True)
    body = ""
    for row in result["rows"]:
        spread = f'title="{row["speedup_low"]:.2f} to {row["speedup_high"]:.2f}"'
        small = "" if row["model"] == result["model"] else f"<small>on {escape(row['model'])}</small>"
        cells = "".join(_cell(row, k) for _, k, _ in COLUMNS).replace("<td", f"<td {spread}", 1)
        body += (
            f'<tr class="{"base" if is_base(result, row) else ""}" data-scope="{escape(row["task"])}"><th scope="row">'
            f'<span class="mono">{escape(row["method"])}</span>{small}</th>'
            f'<td style="text-align:left">{escape(row["task"])}</td>{cells}{_cell(row, "n")}</tr>'
        )
    return (
        '<div class="card scroll" tabindex="0" role="region" aria-label="All figures"><table id="figures" data-sort>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def origin(result: Result) -> str:
    """The provenance, one line a fact."""
    p = result["provenance"]
    names = {"cpu": "processor", "os": "system", "memory_gib": "memory (GiB)", "tasks": None, "quick": None}
    pairs: Iterable[tuple[str, Any]] = ((names.get(k, k), v) for k, v in p.items())
    return "".join(
        f"<div><span>{escape(k)}</span><b>{escape(_plain(v))}</b></div>" for k, v in pairs if k and v is not None
    )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    return f"{text[:10]} {text[11:16]} UTC" if text.endswith("+00:00") else text


def peers_section(result: Result) -> str:
    """Other engines on the same weights, where they were measured."""
    peers = result.get("peers")
    if not peers:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(r["shape"])}</th><td>{escape(r["what"])}</td><td>{escape(r["peer"])}</td>'
        f'<td>{r["stretto"]:.4g}</td><td>{r["theirs"]:.4g}</td><td>{escape(r["unit"])}</td>'
        f'<td title="{r["ratio_low"]:.2f} to {r["ratio_high"]:.2f}"><b>{r["ratio"]:.2f}×</b></td></tr>'
        for r in peers["rows"] if r["ratio"] is not None
    )
    absent = "".join(
        f"<li><b>{escape(a['peer'])}</b> ({escape(a['what'])}): {escape(a['reason'])}</li>" for a in peers["absent"]
    )
    return (
        '<section aria-labelledby="h-peers"><h2 id="h-peers">Beside other engines</h2>'
        '<p class="sub">Random weights of three sizes, the same for all, and the same threads, in turns. Above 1× '
        "stretto is ahead. “16 rows” is what a forward of 16 rows costs, in forwards of one row.</p>"
        '<div class="card scroll" tabindex="0" role="region" aria-label="Peers"><table class="names"><thead><tr>'
        "<th>shape</th><th>what</th><th>beside</th><th>stretto</th><th>theirs</th><th>unit</th><th>ratio</th></tr></thead>"
        f'<tbody>{rows}</tbody></table></div><ul class="notes small">{absent}</ul></section>'
    )
