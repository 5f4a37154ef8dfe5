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


Reading = tuple[list[int], list[int], int]  # first key of each run, query position of the first row for it, rows


def read(plan: Plan, plans: Mapping[View, Plan]) -> tuple[np.ndarray, np.ndarray, np.ndarray, Reading]:
    """(context slots, columns, their counts a row, runs) of the rows of one plan whose sequence reads others.

    ``plans``: who evaluates rows of which view in this forward; their ``row`` is known.
    """
    if plan.step is not None and not plan.plain_chain:
        raise ValueError("a step that chooses positions, context or visibility cannot read other sequences")
    reads, own, n, row = plan.seq.reads, plan.seq.view, plan.rows, plan.row
    writers = [plans.get(v) for v in reads]
    here, end = len(own), 0  # in the own view; in everything that is read
    offsets = []
    for view, writer in zip(reads, writers, strict=True):
        offsets.append(end)
        end += len(view) + (writer.rows if writer else 0)
    end += here
    starts, at, keys, seen = [], [], 0, []
    for view, offset in zip((*reads, own), (*offsets, end - here), strict=True):
        if len(view):
            starts.append(keys)
            at.append(end - offset)
            keys += len(view)
    for writer, offset in zip(writers, offsets, strict=True):
        if writer is not None:
            starts.append(keys)
            at.append(end - offset)
            keys += writer.rows
            seen += range(writer.row, writer.row + writer.rows)
    if seen or not here:  # else the own rows go on with the run of the own view
        starts.append(keys)
        at.append(here)
    columns = [x for i in range(n) for x in (*seen, *range(row, row + i + 1))]
    context = np.concatenate([*(v.slots for v in reads), own.slots])
    counts = np.arange(len(seen) + 1, len(seen) + n + 1, dtype=np.int32)
    return context, np.array(columns, np.int32), counts, (starts, at, n)


def join_runs(parts: Sequence[Reading | int]) -> Runs:
    """The runs of a batch; a part is what ``read`` gave, or a number of rows without any."""
    counts, start, at = [0], [], []
    for part in parts:
        if isinstance(part, int):
            counts += [0] * part
            continue
        starts, first, n = part
        counts += [len(starts)] * n
        start += starts * n
        at += [p + i for i in range(n) for p in first]
    ptr = np.cumsum(counts, dtype=np.int32)
    return Runs(ptr, np.array(start, np.int32), np.array(at, np.int32))


def whole(items: Iterable[Any]) -> list[Any]:
    """Those (each with a ``seq``) whose team is complete among them, or that have none."""
    items = list(items)
    if all(x.seq.team is None for x in items):
        return items
    found = Counter(x.seq.team for x in items if x.seq.team is not None)
    return [x for x in items if x.seq.team is None or found[x.seq.team] >= x.seq.team.size]


def units(plans: Iterable[Plan]) -> list[list[Plan]]:
    """Plans that go together: teams, a plan and those that ride with it, and everybody else alone, in the order of
    their first."""
    out: dict[int, list[Plan]] = {}
    for plan in plans:
        out.setdefault(id(plan.seq.team or plan.base or plan), []).append(plan)
    return list(out.values())

