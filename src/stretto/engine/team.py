"""Sequences that read each other's rows while these are written.

A sequence of a *team* reads whole views in an order of its own, its own last. The keys of every view lie at positions
of that view (0, 1, 2, ...); where a view begins for a reader is the length of what the reader has before it, and goes
into the rotation of the reader's query (``batch.Runs``). So one row has as many distances as there are readers, and no
key is copied. Rows that a teammate evaluates in the same forward are seen as if they had been there, and counted in
every offset. Therefore a team goes forward as a whole or not at all: what it computes never depends on batch mates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stretto.errors import UnsupportedError
from stretto.models.batch import Runs

if TYPE_CHECKING:
    from stretto.engine.cache import View
    from stretto.engine.pack import Plan
    from stretto.engine.runner import Runner

__all__ = ["Team", "check_model", "join_runs", "read", "units", "whole"]


@dataclass(slots=True, eq=False)
class Team:
    """``size``: sequences that must be there before any of them goes on; whoever joins or leaves writes it."""

    size: int = 0


def check_model(runner: Runner) -> None:
    """UnsupportedError where keys cannot stay at the positions of their own segment."""
    config, rotary = runner.config, runner.model.rotary
    if config.attention != "causal":
        raise UnsupportedError(f"threads that read each other need causal attention, not {config.attention!r}")
    if rotary.cacheable is not None:
        raise UnsupportedError(
            f"threads that read each other need shiftable positions: rope types default, linear, llama3 or yarn; "
            f"the angles of {rotary.rope.type!r} change with the length"
        )
    if any(config.windows):
        raise UnsupportedError("a sliding window would cut what other threads wrote: the model must have none")
    if not runner.alloc.shares:
        raise UnsupportedError("kv_layout='slots' cannot share rows: load the model with kv_layout='paged'")


def read(plan: Plan, plans: Mapping[View, Plan]) -> tuple[np.ndarray, np.ndarray, np.ndarray, Runs]:
    """(context slots, columns, their counts a row, runs a row) of the rows of one plan whose sequence reads others.

    ``plans``: who evaluates rows of which view in this forward; their ``row`` is known.
    """
    if plan.step is not None and not plan.plain_chain:
        raise ValueError("a step that chooses positions, context or visibility cannot read other sequences")
    reads, own, n = plan.seq.reads, plan.seq.view, plan.rows
    cached = np.array([len(v) for v in reads], np.int64)
    fresh = np.array([plans[v].rows if v in plans else 0 for v in reads], np.int64)
    offsets = np.concatenate([[0], np.cumsum(cached + fresh)])
    here = len(own) + np.arange(n)  # in the own view
    there = offsets[-1] + here  # in everything that is read
    lengths = np.concatenate([cached, [len(own)], fresh, [n]])
    by_piece = np.stack([*(there - o for o in offsets[:-1]), here])  # [pieces, n]
    at = np.concatenate([by_piece, by_piece])[lengths > 0]
    starts = (np.cumsum(lengths) - lengths)[lengths > 0]
    others = [np.arange(plans[v].row, plans[v].row + plans[v].rows) for v in reads if v in plans]
    seen = np.concatenate(others) if others else np.empty(0, np.int64)
    columns = np.concatenate([x for i in range(n) for x in (seen, np.arange(plan.row, plan.row + i + 1))])
    counts = len(seen) + np.arange(1, n + 1)
    pieces = len(starts)
    runs = Runs(_ints(np.full(n, pieces)), _ints(np.tile(starts, n)), _ints(at.T.ravel()))
    return np.concatenate([*(v.slots for v in reads), own.slots]), _ints(columns), _ints(counts), runs


def join_runs(parts: Sequence[Runs | int]) -> Runs:
    """The runs of a batch; a part is what ``read`` gave (its ``ptr`` counts runs a row) or rows without any."""
    none = np.empty(0, np.int32)
    made = [Runs(np.zeros(p, np.int32), none, none) if isinstance(p, int) else p for p in parts]
    ptr = np.concatenate([[0], np.cumsum(np.concatenate([p.ptr for p in made]))])
    return Runs(_ints(ptr), np.concatenate([p.start for p in made]), np.concatenate([p.at for p in made]))


def whole(items: Iterable[Any]) -> list[Any]:
    """Those (each with a ``seq``) whose team is complete among them, or that have none."""
    items = list(items)
    found = Counter(x.seq.team for x in items)
    return [x for x in items if x.seq.team is None or found[x.seq.team] >= x.seq.team.size]


def units(plans: Iterable[Plan]) -> list[list[Plan]]:
    """Plans that go together: teams, and everybody else alone, in the order of their first."""
    out: dict[int, list[Plan]] = {}
    for plan in plans:
        out.setdefault(id(plan.seq.team or plan), []).append(plan)
    return list(out.values())


def _ints(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.int32)
