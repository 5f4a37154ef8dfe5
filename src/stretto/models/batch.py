"""What one forward evaluates: a flat batch of rows, and the pool that holds every row's keys and values.

Legend of shapes: n rows of the batch, s contexts (one per sequence in the batch), c context slots in all,
m local references in all, k rows that need logits, L layers, S slots of the pool, G kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from stretto.models.entries import Entry

__all__ = ["Doubt", "Early", "EarlyLogits", "FlatBatch", "ForwardResult", "KVPool", "Runs"]

Ints = np.ndarray  # int32 unless said otherwise
Early = Mapping[int, Callable[["ForwardResult"], None]]  # layer (1-based) -> who looks at what it would give
EarlyLogits = Mapping[int, Callable[[Tensor], None]]


@dataclass(slots=True, frozen=True)
class Runs:
    """Rows that read their keys in runs, each with the query at a position of its own: the keys of a run lie at
    positions of their own segment, and only the distance to the query counts (R(p - o) q against R(i) k).

    Row i reads its list from key ``start[r]`` on, up to the next run's, with the query at position ``at[r]``, for r in
    ptr[i]..ptr[i+1]-1; the first ``start`` is 0. A row without runs reads all with the query at its own position.
    """

    ptr: Ints  # [n+1]
    start: Ints  # [r]
    at: Ints  # [r]

    def taken(self, order: np.ndarray) -> Runs:
        """Those of the rows ``order``, in that order."""
        counts = np.diff(self.ptr)[order]
        ends = counts.cumsum()
        index = np.repeat(self.ptr[order] - (ends - counts), counts) + np.arange(counts.sum())
        return Runs(np.concatenate([[0], ends]).astype(np.int32), self.start[index], self.at[index])


@dataclass(slots=True)
class FlatBatch:
    """The rows of all sequences of all methods, flattened.

    Row i attends, in this order, to the slots ``context[context_ptr[q]:context_ptr[q+1]]`` with
    ``q = context_of[i]``, then to the rows ``local[local_ptr[i]:local_ptr[i+1]]`` of this batch (itself
    included). Both lists are in logical order, which fixes the order of every sum. Keys and values of row i
    are written to ``slots[i]`` before anything of the layer is read. A model with a sliding window also
    drops keys with ``positions[i] - position(key) >= window``.
    """

    tokens: np.ndarray  # int64 [n]; ignored where ``embeds`` has the row
    positions: Ints  # [n] logical positions (rotary angles)
    slots: Ints  # [n] slot of the pool that receives the row's K/V
    context_of: Ints  # [n] index of the row's context, in 0..s-1
    context: Ints  # [c]
    context_ptr: Ints  # [s+1]
    local: Ints  # [m] row numbers
    local_ptr: Ints  # [n+1]
    logit_rows: Ints  # [k] rows whose logits are wanted
    taps: Sequence[int] = ()  # layers whose output hidden states are wanted (0 = embeddings, l = after layer l)
    embeds: Tensor | None = None  # [len(embed_rows), H], replaces the token embedding of embed_rows
    embed_rows: Ints | None = None
    entries: Sequence[Entry] = ()  # rows that enter in mid-stack
    sharing: Sequence[tuple[Any, Ints]] = ()  # (rule, rows): rows that route within one set of experts (moe.Rule)
    runs: Runs | None = None  # rows that read segments at positions of their own
    sure: bool = False  # whether the probability of each row's likeliest token is wanted
    ints: Ints | None = None  # where the arrays from positions to logit_rows are views of one: ``lay`` made them

    @classmethod
    def lay(cls, tokens: np.ndarray, rows: int, contexts: int, parts: Sequence[np.ndarray], **more: Any) -> FlatBatch:
        """A batch whose integer arrays lie behind each other, as the native forward reads them.

        ``parts``: int32 pieces in the order positions, slots, context_of [n each], context_ptr [s+1],
        local_ptr [n+1], context, local, logit_rows.
        """
        ints = np.concatenate(parts, dtype=np.int32, casting="same_kind")
        a, b, c = rows, 2 * rows, 3 * rows
        d = c + contexts + 1
        e = d + rows + 1
        f = e + int(ints[d - 1])
        g = f + int(ints[e - 1])
        return cls(
            tokens, ints[:a], ints[a:b], ints[b:c], ints[e:f], ints[c:d], ints[f:g], ints[d:e], ints[g:],
            ints=ints, **more,
        )

    @property
    def n(self) -> int:
        return len(self.tokens)

    @property
    def furthest(self) -> int:
        """The largest position of a row or of a query."""
        most = int(self.positions.max())
        return most if self.runs is None or not len(self.runs.at) else max(most, int(self.runs.at.max()))

    def in_one(self) -> Ints:
        """All integer arrays in the order of ``lay``, then ``embed_rows``. IndexError where they do not fit."""
        if self.ints is not None and self.embed_rows is None:
            return self.ints
        n = self.n
        arrays = [
            self.positions, self.slots, self.context_of, self.context_ptr, self.local_ptr, self.context, self.local,
            self.logit_rows, *([] if self.embed_rows is None else [self.embed_rows]),
        ]  # fmt: skip
        if [len(x) for x in arrays[:5]] != [n, n, n, len(self.context_ptr), n + 1]:
            raise IndexError(f"the arrays of the batch do not fit its {n} rows")
        return np.concatenate(arrays, dtype=np.int32, casting="same_kind")


@dataclass(slots=True)
class ForwardResult:
    """What a forward gives back."""

    logits: Tensor  # float32 [k, V]
    hidden: dict[int, Tensor] = field(default_factory=dict)  # tap layer -> [n, H]; -1 = final-normed state
    argmax: np.ndarray | None = None  # int64 [k]: the lowest id of each row's largest logit; the runner sees to it
    sure: np.ndarray | None = None  # float32 [k]: its probability, where the batch asks and the forward gives it


@dataclass(slots=True, frozen=True)
class Doubt:
    """When a greedy continuation ends early: behind the token with which ``gain`` times the rates of all its tokens,
    times the last rate once more, falls below ``least``. The rate of a token is that of the class of its probability;
    ``borders`` between the classes, ascending."""

    borders: Sequence[float]  # [classes - 1]
    rates: Sequence[float]  # [classes]
    gain: float
    least: float


class KVPool:
    """Keys and values of all layers, one slot a row: ``k``, ``v`` of shape [L, S, G, D].

    Slots never move: a sequence is a table of slot numbers, so that fork, truncation and the compaction of an
    accepted tree path rewrite tables only.
    """

    def __init__(
        self, layers: int, slots: int, kv_heads: int, head_dim: int,
        *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
    ):
        shape = (layers, slots, kv_heads, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.positions = np.zeros(slots, np.int32)  # logical position of each slot's key
        self.region = 0  # > 0: every sequence has so many slots of its own, side by side (layout "slots")

    def part(self, first: int, last: int) -> KVPool:
        """The same memory, layers ``first``..``last`` - 1 only."""
        out = object.__new__(KVPool)
        out.k, out.v, out.positions = self.k[first:last], self.v[first:last], self.positions
        return out

    @property
    def slots(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()
