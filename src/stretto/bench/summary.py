"""What a result says in a sentence or two, computed from its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["PAYS", "best_lossless", "headline", "is_base", "title"]

PAYS = 1.05  # below this a speed-up is not worth a sentence
_DROP = 0.02  # quality that a method may lose and still be called nearly as good

Row = Mapping[str, Any]
Result = Mapping[str, Any]


def is_base(result: Result, row: Row) -> bool:
    """Whether the row is the baseline's own."""
    return all(row[k] == result["baseline"][k] for k in ("model", "method"))


def title(result: Result, row: Row) -> str:
    """The method's name, with its model where that is not the one of the bench."""
    return row["method"] if row["model"] == result["model"] else f"{row['method']} on {row['model']}"


def best_lossless(result: Result, rows: Iterable[Row]) -> Row | None:
    """The fastest of ``rows`` that promises plain decoding's text and wrote it on every prompt.

    None where none pays: the gain must be worth a sentence, and the slowest round no loss beyond the noise.
    """
    same = [r for r in rows if r["lossless"] and r["equal"] == 1.0 and not is_base(result, r)]
    pays = [r for r in same if r["speedup"] >= PAYS and r["speedup_low"] >= 1.0 - result["noise"]]
    return max(pays, key=lambda r: r["speedup"], default=None)


def headline(result: Result) -> list[str]:
    """One to three sentences: the best method with the same text, where it pays most, the fastest of any quality."""
    totals = result["totals"]
    best = best_lossless(result, totals)
    fastest = _fastest(result, best)
    if best is not None:
        first = (
            f"{best['method']} writes the same text {_times(best['speedup'])} faster than plain decoding "
            f"of {result['model']}."
        )
    elif fastest and not any(r["lossless"] for r in totals):
        return [fastest]
    else:
        first = f"Nothing measured here is both exact and faster than plain decoding of {result['model']}."
    return [s for s in (first, _where(result), fastest) if s]


def _times(value: float) -> str:
    return f"{value:.1f} times" if value < 9.95 else f"{value:.0f} times"


def _where(result: Result) -> str:
    """Which families gain most, by which method, and which gain nothing."""
    families: dict[str, list[Row]] = {}
    for row in result["families"]:
        families.setdefault(row["family"], []).append(row)
    best = {name: best_lossless(result, rows) for name, rows in families.items()}
    pays = sorted(((r["speedup"], name, r["method"]) for name, r in best.items() if r), reverse=True)
    if len(families) < 2 or not pays:
        return ""
    parts = ", ".join(f"{speed:.1f}× on {name} ({method})" for speed, name, method in pays[:3])
    nothing = ", ".join(name for name, r in best.items() if r is None)
    return f"The best gains with the same text: {parts}{f'; none on {nothing}' if nothing else ''}."


def _fastest(result: Result, best: Row | None) -> str:
    """A sentence about the fastest method of all, where that is not ``best``."""
    base = next(r for r in result["totals"] if is_base(result, r))
    others = [r for r in result["totals"] if not is_base(result, r) and r["quality"] is not None]
    top = max(others, key=lambda r: r["speedup"], default=None)
    if top is None or base["quality"] is None or top["speedup"] < max(PAYS, best["speedup"] if best else 0):
        return ""
    if top is best:
        return ""
    lost = base["quality"] - top["quality"]
    what = "with no fewer" if lost <= 0 else "with nearly as many" if lost <= _DROP else "with fewer"
    return (
        f"Fastest of all is {title(result, top)}: {_times(top['speedup'])} faster, {what} right answers "
        f"({top['quality']:.0%}; plain decoding {base['quality']:.0%})."
    )
