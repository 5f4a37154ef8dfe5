"""The bars that ``stretto bench --peers`` is held to, and whether they hold.

A bar names rows of ``peers.py`` by what was measured, the shape and the peer; its figure is the row's ``ratio`` (above
1 = ours is better), or our own figure where the bar is about that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BARS", "Bar", "judge"]


@dataclass(frozen=True)
class Bar:
    """``field`` of the row must be at least ``bar``, or at most, with ``lower``; ``bar`` None: only reported."""

    claim: str
    what: str
    shape: str
    peer: str
    bar: float | None
    field: str = "ratio"
    lower: bool = False


GENERATE, CONTINUOUS, LLAMA = "transformers generate", "transformers continuous batching", "llama.cpp"
ONE_ROW, DEFAULT, SINGLY = "stretto, one row", "stretto, default mode", "stretto, one by one"
MIXED = "batch 16, mixed lengths"

TIMES = {GENERATE: "transformers' generate", LLAMA: "llama.cpp", CONTINUOUS: "transformers' continuous batching"}


def _row(shape: str, peer: str, bar: float) -> Bar:
    return Bar(f"one row: speed, times {TIMES[peer]}", "one row", shape, peer, bar)


def _exact(what: str, bar: float | None) -> Bar:
    claim = f"{what} in deterministic mode: speed, times the default"
    return Bar(claim, f"{what}, deterministic", "125M", DEFAULT, bar)


def _batch(shape: str, peer: str, bar: float | None) -> Bar:
    return Bar(f"batch 16 of mixed lengths: throughput, times {TIMES.get(peer, 'batch 1')}", MIXED, shape, peer, bar)


def _many(shape: str, bar: float | None) -> Bar:
    return Bar("16 rows: cost, times one row", "16 rows", shape, ONE_ROW, bar, "stretto", lower=True)


BARS = (
    _row("125M", GENERATE, 1.7), _row("125M", LLAMA, 0.85), _row("tiny", GENERATE, 2.5),
    _many("125M", 1.25), _many("tiny", None),
    _exact("one row", 0.9), _exact("16 rows of a chain", 0.9), _exact("16 rows of a block", 0.9),
    _exact("16 rows of a tree", 0.9), _exact("decoding by trees (lookahead)", None),
    _batch("125M", SINGLY, 5.0), _batch("125M", CONTINUOUS, 1.5), _batch("tiny", SINGLY, None),
    _batch("tiny", CONTINUOUS, None),
)  # fmt: skip


def judge(rows: Sequence[Mapping[str, Any]], absent: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """[{"claim", "shape", "measured", "bar", "at_most", "holds", "reason"}]: ``holds`` is None where nothing was
    measured, or where there is no bar; ``reason`` says why.
    """
    found = {(r["what"], r["shape"], r["peer"]): r for r in rows}
    out = []
    for bar in BARS:
        row = found.get((bar.what, bar.shape, bar.peer))
        measured = None if row is None else row[bar.field]
        holds, reason = None, ""
        if measured is None:
            told = [a["reason"] for a in absent if a["peer"] == bar.peer]
            reason = told[0] if told else "not measured in this run"
        elif bar.bar is None:
            reason = "reported; there is no bar"
        else:
            holds = measured <= bar.bar if bar.lower else measured >= bar.bar
        out.append({
            "claim": bar.claim, "shape": bar.shape, "measured": measured, "bar": bar.bar,
            "at_most": bar.lower, "holds": holds, "reason": reason,
        })  # fmt: skip
    return out
