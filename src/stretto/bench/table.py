"""A result in the terminal: one line a method, one column a family of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stretto.bench.summary import best_lossless, is_base, title

__all__ = ["print_evaluation", "print_peers", "print_rows"]

WIDE = 118  # columns from which one table holds everything
FIGURES = ("tokens/\nforward", "same\ntext", "answers\nright", "ms/\ntoken")

Row = Mapping[str, Any]


def print_rows(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result of ``bench``: the finding, speed-ups by family with the best lossless starred, and the terms."""
    out = console or Console()
    out.print()
    out.print(Text(result["headline"][0], style="bold"))
    for sentence in result["headline"][1:]:
        out.print(sentence, highlight=False)
    out.print()
    for table in _tables(result, wide=out.width >= WIDE):
        out.print(table)
        out.print()
    out.print(Text(_against(result), style="dim"))
    if result.get("peers"):
        out.print()
        out.print(_peers(result["peers"]))
        out.print(_bars(result["peers"]))
    for text in _asides(result):
        out.print(Text(text, style="dim"))


def _tables(result: Mapping[str, Any], *, wide: bool) -> list[Table]:
    """One table where it fits; on a narrow terminal the speed-ups by family go below the figures over all tasks."""
    families = list(dict.fromkeys(r["family"] for r in result["families"]))
    if len(families) < 2:
        return [_table(result, ["all"], FIGURES)]
    if wide:
        return [_table(result, ["all", *families], FIGURES)]
    return [_table(result, ["all"], FIGURES), _table(result, families, ())]


def _table(result: Mapping[str, Any], groups: list[str], figures: Sequence[str]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold", min_width=10)
    for name in ("speed-up" if g == "all" else g for g in groups):
        table.add_column(name, justify="right", no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    lines = {g: [r for r in result["families"] if r["family"] == g] or result["totals"] for g in groups}
    best = {g: best_lossless(result, rows) for g, rows in lines.items()}
    top = best_lossless(result, result["totals"])
    for row in result["totals"]:
        same = [next((r for r in lines[g] if _key(r) == _key(row)), None) for g in groups]
        cells = [_speed(result, r, r is best[g]) if r else Text("") for r, g in zip(same, groups, strict=True)]
        style = "bold green" if row is top else "dim" if is_base(result, row) else ""
        name = Text(title(result, row).replace("zoo:", ""), style=style)
        table.add_row(name, *cells, *(_figures(row) if figures else ()))
    return table


def _key(row: Row) -> tuple[str, str]:
    return row["model"], row["method"]


def _speed(result: Mapping[str, Any], row: Row, star: bool) -> Text:
    """Green where it gains, red where it loses, a star on the best lossless one."""
    value = row["speedup"]
    style = "dim" if is_base(result, row) else "red" if value < 0.97 else "green" if value >= 1.05 else "yellow"
    return Text(f"{value:.2f}×" + ("★" if star else " "), style=f"bold {style}" if star else style)


def _figures(row: Row) -> list[Text]:
    equal, quality = row["equal"], row["quality"]
    per_token = row["seconds_per_token"]
    return [
        Text(f"{row['tokens_per_forward']:.2f}" if row["tokens_per_forward"] else "-"),
        Text("-", style="dim") if equal is None else Text(f"{equal:.0%}", style="green" if equal == 1 else "red"),
        Text("-" if quality is None else f"{quality:.0%}"),
        Text(f"{per_token * 1000:.2f}" if per_token else "-"),
    ]


def _peers(peers: Mapping[str, Any]) -> Table:
    """Ours beside other engines on the same random weights."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("shape", "what", "beside"):
        table.add_column(name, overflow="fold")
    for name in ("stretto", "theirs", "unit", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in peers["rows"]:
        style = "green" if r["ratio"] >= 1 else "red"
        figures = (f"{r['stretto']:.4g}", f"{r['theirs']:.4g}", r["unit"], Text(f"{r['ratio']:.2f}×", style=style))
        table.add_row(r["shape"], r["what"], r["peer"], *figures)
    for a in peers["absent"]:
        table.add_row("", a["what"], a["peer"], "-", "-", "", Text("absent", style="dim"))
    return table


def _bars(peers: Mapping[str, Any]) -> Table:
    """What was promised, what was measured, and whether it holds."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("bar", "shape"):
        table.add_column(name, overflow="fold")
    for name in ("measured", "promised", "holds"):
        table.add_column(name, justify="right", no_wrap=True)
    for b in peers.get("bars", ()):
        holds = {True: Text("yes", style="green"), False: Text("no", style="red")}.get(b["holds"], Text("-"))
        promised = "" if b["bar"] is None else f"{'≤' if b['at_most'] else '≥'} {b['bar']:g}"
        table.add_row(b["claim"], b["shape"], "-" if b["measured"] is None else f"{b['measured']:.2f}", promised, holds)
    return table


def print_peers(peers: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what ``measure_peers`` found: rows, then bars, then who is absent and why."""
    out = console or Console()
    out.print(_peers(peers))
    if peers.get("bars"):
        out.print()
        out.print(_bars(peers))
    for a in peers["absent"]:
        out.print(Text(f"{a['peer']} ({a['what']}): {a['reason']}", style="dim"))


def _against(result: Mapping[str, Any]) -> str:
    p = result["provenance"]
    return (
        f"Speed-up in wall-clock time against plain decoding ({result['baseline']['method']}) of {result['model']}: "
        f"median of {p['rounds']} rounds, {p['samples']} prompts for each of {len(p['tasks'])} tasks, every method on "
        f"every prompt in turns; two runs of the baseline differ by {result['noise']:.1%}. ★ fastest lossless. "
        f"Batch {p['batch']}, {p.get('dtype')}, {p.get('backend')} backend, threads: {p.get('threads')}, {p['cpu']}."
    )


def _asides(result: Mapping[str, Any]) -> list[str]:
    notes = [f"{title(result, r)} {n}" for r in result["totals"] for n in r["notes"]]
    skipped = [f"{s['method']} on {s['model']} was left out: {s['reason']}" for s in result["skipped"]]
    absent = [f"{a['peer']} ({a['what']}): {a['reason']}" for a in result.get("peers", {}).get("absent", ())]
    where = [f"Report: {result['html']}"] if result.get("html") else []
    return [*notes, *skipped, *absent, *where]


def print_evaluation(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result of ``evaluate``: accuracy per task with its standard error, then per family."""
    out = console or Console()
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for name, side in (("task", "left"), ("family", "left"), ("accuracy", "right"), ("±", "right"), ("n", "right")):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for r in result["rows"]:
        table.add_row(r["task"], r["family"], f"{r['accuracy']:.1%}", f"{r['stderr']:.1%}", str(r["n"]))
    out.print(table)
    line = ", ".join(f"{r['family']} {r['accuracy']:.1%}" for r in result["families"])
    out.print(Text(f"\nBy family: {line}", style="bold"))
    p = result["provenance"]
    out.print(
        Text(f"{p['model']} by {p['method']}, greedy, held-out prompts, seed {p['seed']}, {p['dtype']}.", style="dim")
    )
