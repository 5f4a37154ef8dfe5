"""Rows that enter a forward in mid-stack.

A row of an ``Entry`` takes no part in the layers up to ``layer``. Behind it, its state is the matrix times the state
that the source row has there, and from then on it is a row like any other: at its own position, seeing what the batch
says, its keys and values (of the layers that it went through) in its own slot. Layer 0 is behind the embeddings,
layer L behind the last layer, where only the final norm and the head are left.

Who sees a row enters no earlier than it: rows that enter nowhere never see one that does, so their bits are what they
would be without. Legend: e rows of an entry, n rows of the batch, H hidden.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stretto.errors import OptionError, UnsupportedError
from stretto.models.batch import FlatBatch

__all__ = ["Entries", "Entry", "Matrix", "check", "check_layers", "enter", "entry_layers", "sink", "structs"]


class _Struct(ctypes.Structure):
    """``Entry`` of ``native.h``."""

    _fields_ = [(name, ctypes.c_int32) for name in ("layer", "first", "n", "unused")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("matrix", "sources")]


class Matrix:
    """A weight [H, H] for entries; ``packed``: what the native forward made of it (``Runner.matrix`` makes both)."""

    __slots__ = ("packed", "weight")

    def __init__(self, weight: Tensor, packed: Any = None):
        self.weight, self.packed = weight, packed


@dataclass(frozen=True, slots=True)
class Entry:
    """``rows`` enter behind layer ``layer`` with ``matrix`` times the states of ``sources`` there."""

    layer: int
    matrix: Matrix
    rows: np.ndarray  # int32 [e]
    sources: np.ndarray  # int32 [e] rows of the same batch (or step) that entered before

    def shifted(self, by: int) -> Entry:
        """The entry with row numbers of a batch in which the step's first row is row ``by``."""
        if not by:
            return self
        return Entry(self.layer, self.matrix, self.rows + np.int32(by), self.sources + np.int32(by))


class Entries(tuple[Entry, ...]):
    """Entries whose layout is used again and again: what is derived from it is kept."""

    settled = -1  # rows of the batch for which ``sink`` found nothing to move
    packed: Any = None  # for the native forward


def entry_layers(batch: FlatBatch) -> np.ndarray:
    """int64 [n]: the layer behind which each row enters; -1 = it is there from the start."""
    out = np.full(batch.n, -1)
    for entry in batch.entries:
        out[entry.rows] = entry.layer
    return out


def check_layers(entries: Sequence[int], layers: int, chain: bool = False) -> None:
    """OptionError unless slots may enter behind these layers, one after the other."""
    given = list(entries)
    if not given or min(given) < 0 or max(given) > layers or given != sorted(given):
        raise OptionError("entries", given, f"layers 0..{layers} that do not fall: slot i is seen by those after it")
    if chain and len(set(given)) > 1:
        raise OptionError("entries", given, "one layer for all slots of a chain")


def check(batch: FlatBatch, layers: int) -> None:
    """UnsupportedError for an entry outside 0..layers, a source that is not there yet, or a row that sees one."""
    at = entry_layers(batch)
    for entry in batch.entries:
        if not 0 <= entry.layer <= layers:
            raise UnsupportedError(f"rows cannot enter behind layer {entry.layer}: the model has layers 1..{layers}")
        if (at[entry.sources] >= entry.layer).any():
            raise UnsupportedError(f"a row that enters behind layer {entry.layer} needs a source that entered before")
    if (at[batch.local] > np.repeat(at, np.diff(batch.local_ptr))).any():
        raise UnsupportedError("a row sees another that enters behind a later layer than it does itself")


def enter(x: Tensor, entries: Sequence[Entry], layer: int) -> Tensor:
    """The states [n, H] behind ``layer`` with the rows that enter there."""
    for entry in entries:
        if entry.layer == layer:
            at = (entry.rows, entry.sources)
            rows, sources = (torch.from_numpy(np.asarray(i, np.int64)).to(x.device) for i in at)
            x = x.index_copy(0, rows, x[sources] @ entry.matrix.weight.to(x).T)
    return x


def sink(batch: FlatBatch) -> tuple[FlatBatch, np.ndarray | None]:
    """The batch with the entering rows last, by layer, those of one matrix together; and where each old row is now.

    So the rows that take part in a layer are the first ones. None: nothing had to move.
    """
    entries, n = batch.entries, batch.n
    kept = entries if isinstance(entries, Entries) else None
    if kept is not None and kept.settled == n:
        return batch, None
    order = np.concatenate([e.rows for e in entries])
    layers = [e.layer for e in entries]
    if layers == sorted(layers) and np.array_equal(order, np.arange(n - len(order), n)):
        if kept is not None:
            kept.settled = n
        return batch, None
    groups: dict[tuple[int, int], list[Entry]] = {}
    for e in sorted(entries, key=lambda e: e.layer):
        groups.setdefault((e.layer, id(e.matrix)), []).append(e)
    entered = np.concatenate([e.rows for same in groups.values() for e in same])
    first = np.setdiff1d(np.arange(n), entered)
    order = np.concatenate([first, entered])
    now = np.empty(n, np.int32)
    now[order] = np.arange(n, dtype=np.int32)
    merged, at = [], len(first)
    for (layer, _), same in groups.items():
        sources = now[np.concatenate([e.sources for e in same])]
        rows = np.arange(at, at + len(sources), dtype=np.int32)
        merged.append(Entry(layer, same[0].matrix, rows, sources))
        at += len(sources)
    counts = np.diff(batch.local_ptr)[order]
    ends = counts.cumsum()
    local = now[batch.local[np.repeat(batch.local_ptr[order] - (ends - counts), counts) + np.arange(ends[-1])]]
    moved = replace(
        batch, tokens=batch.tokens[order], positions=batch.positions[order], slots=batch.slots[order],
        context_of=batch.context_of[order], local=local,
        local_ptr=np.concatenate([[0], ends]).astype(np.int32), logit_rows=now[batch.logit_rows],
        embed_rows=None if batch.embed_rows is None else now[batch.embed_rows], entries=merged,
        runs=None if batch.runs is None else batch.runs.taken(order), ints=None,
    )  # fmt: skip
    return moved, now


def structs(entries: Sequence[Entry]) -> ctypes.Array:
    """The entries of a batch in the order of ``sink`` as the native forward reads them; they must outlive it."""
    kept = entries if isinstance(entries, Entries) else None
    if kept is not None and kept.packed is not None:
        return kept.packed
    made = (_Struct * len(entries))(
        *(
            (e.layer, e.rows[0], len(e.rows), 0, ctypes.addressof(e.matrix.packed.mat), e.sources.ctypes.data)
            for e in entries
        )
    )
    if kept is not None:
        kept.packed = made
    return made
