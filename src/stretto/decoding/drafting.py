"""A draft model's side of speculation: its cache, its forwards, and trees that grow level by level.

The draft keeps K/V of its own for each sequence. Rows of the text are final; the rows of drafts are
appended behind them for a chain, and hang beside them in slots of their own for a tree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import numpy as np
from torch import Tensor

from stretto.decoding.costs import Costs
from stretto.decoding.tree import Shape, Tree
from stretto.engine.cache import View
from stretto.engine.runner import Runner
from stretto.engine.types import Sequence
from stretto.models.batch import Doubt, FlatBatch

__all__ = ["DraftCache", "DraftModel", "Growth", "Rows"]

CHUNK = 512  # rows of one forward over a text that the draft has not read yet


@dataclass(slots=True)
class Rows:
    """Consecutive rows of one path; ``slots`` are theirs, ``context`` those of what is before."""

    tokens: list[int]
    position: int
    slots: np.ndarray
    context: np.ndarray


@dataclass(slots=True)
class DraftCache:
    """What the draft has of one sequence: ``view`` of the text, ``slots`` of this step's tree nodes."""

    view: View
    slots: dict[int, int] = field(default_factory=dict)


class Growth:
    """A tree that grows after a static shape; a node whose law has few tokens has fewer children.

    ``keys``: for each node but the root, (depth - 1) * topk + rank. ``laws``: node -> the law that
    its children were drawn from, where they were drawn.
    """

    def __init__(self, seq: Sequence, shape: Shape, count: int):
        self.seq, self.count, self.tree = seq, count, Tree.rooted(seq.tokens[-1])
        self.keys: list[int] = []
        self.laws: dict[int, np.ndarray] = {}
        self.trust: list[int] = []  # of a chain: classes of the draft's confidence
        self.gain = 1.0  # of a chain: its path product by confidence
        self._place = [0]  # tree node -> node of the shape
        self._below: dict[int, list[tuple[int, int]]] = {}  # node of the shape -> (child, rank)s
        for i in range(count):
            self._below.setdefault(shape.parent[i], []).append((i + 1, shape.rank[i]))

    def children(self, node: int) -> int:
        return len(self._below[self._place[node]])

    def add(self, node: int, tokens: list[int], topk: int) -> list[int]:
        """Hang ``tokens`` under ``node``; those of the new nodes that shall have children."""
        out = []
        for token, (place, rank) in zip(tokens, self._below[self._place[node]], strict=False):
            child = self.tree.add(node, token)
            self._place.append(place)
            self.keys.append((self.tree.depth[child] - 1) * topk + rank)
            if place in self._below:
                out.append(child)
        return out


class DraftModel:
    """The draft's runner and what it has cached. ``costs``: its measured curve, None = unplanned."""

    def __init__(self, runner: Runner, costs: Costs | None):
        self.runner, self.costs = runner, costs
        self.expected = 0.0  # seconds of its forwards by the curve; the caller resets it
        self._live: OrderedDict[Sequence, DraftCache] = OrderedDict()  # least recently used first

    def forward(self, rows: list[Rows]) -> Tensor:
        """float32 [len(rows), V]: the logits of the last row of each item."""
        batch = flat(rows)
        if self.costs is not None:
            self.expected += self.costs.table(rows[0].position, batch.n)[batch.n]
        return self.runner.forward(batch).logits

    def read(self, seq: Sequence, cache: DraftCache) -> None:
        """Read a long unread text in chunks; a few tokens wait for the first level."""
        view, few = cache.view, 32 if self.runner.max_rows is None else 1
        while (unread := len(seq.tokens) - 1 - len(view)) > few:
            n, at = min(unread, self.runner.max_rows or CHUNK), len(view)
            slots = self.runner.alloc.alloc(n)
            self.forward([Rows(seq.tokens[at : at + n], at, slots, view.slots)])
            view.append(slots)

    def rows(self, growth: Growth, node: int, cache: DraftCache, chain: bool) -> Rows:
        """The rows that evaluate ``node``: for the root all that is unread of the text."""
        alloc, view = self.runner.alloc, cache.view
        if node == 0:
            tokens = growth.seq.tokens[len(view) :]
            return Rows(tokens, len(view), alloc.alloc(len(tokens)), view.slots)
        slots, token = alloc.alloc(1), growth.tree.tokens[node]
        if chain:
            return Rows([token], len(view), slots, view.slots)
        path = growth.tree.path(node)
        above = np.array([cache.slots[n] for n in path[:-1]], np.int32)
        cache.slots[node] = int(slots[0])
        position = len(growth.seq.tokens) - 1 + len(path)
        return Rows([token], position, slots, np.concatenate([view.slots, above]))

    def chain(self, growth: Growth, cache: DraftCache, doubt: Doubt | None) -> None:
        """Grow a greedy chain in one go; what is unread of the text is read with its first row."""
        alloc, view, seq = self.runner.alloc, cache.view, growth.seq
        tokens, position = seq.tokens[len(view) :], len(view)
        slots = alloc.alloc(len(tokens) - 1 + growth.count)
        drafts, growth.trust = self.runner.chain(view.slots, tokens, position, slots, doubt)
        used = len(tokens) - 1 + len(drafts)
        view.append(slots[:used])
        if used < len(slots):
            alloc.release(slots[used:])
        for node, token in enumerate(drafts):
            growth.add(node, [token], 1)
        if self.costs is not None:
            table = self.costs.table(position, len(tokens))
            self.expected += table[len(tokens)] + (len(drafts) - 1) * table[1]

    def keep(self, cache: DraftCache, length: int, path: Seq[int]) -> None:
        """After a verification: the first ``length`` rows stay, and those of tree nodes ``path``."""
        kept = [cache.slots.pop(n) for n in path if n in cache.slots]
        self.forget(cache, min(length, len(cache.view)))
        cache.view.append(np.array(kept, np.int32))

    def forget(self, cache: DraftCache, length: int) -> None:
        """Drop the rows of drafts, and those of the text from ``length`` on."""
        if cache.slots:
            self.runner.alloc.release(np.array(list(cache.slots.values()), np.int32))
            cache.slots = {}
        if len(cache.view) > length:
            cache.view.truncate(length)

    def release(self, seq: Sequence, cache: DraftCache) -> None:
        self.forget(cache, 0)
        self._live.pop(seq, None)

    def fit(self, wanted: list[tuple[Sequence, DraftCache, int]]) -> int:
        """Make room for the sequences that draft (with how many tokens); how many of them have it.

        Idle sequences lose their rows first, the longest idle before all, then the last of
        ``wanted`` go without a draft.
        """
        alloc = self.runner.alloc
        for seq, cache, _ in wanted:
            self._live[seq] = cache
            self._live.move_to_end(seq)
        needs = [len(seq.tokens) - len(cache.view) + n for seq, cache, n in wanted]
        need = sum(needs)
        while need > alloc.free and len(self._live) > len(wanted):
            self.forget(self._live.popitem(last=False)[1], 0)
        fits = len(wanted)
        while need > alloc.free:
            fits -= 1
            need -= needs[fits]
            seq, cache, _ = wanted[fits]
            self.release(seq, cache)
            seq.metrics.note("drafting paused: the draft's cache is full")
        return fits


def flat(rows: list[Rows]) -> FlatBatch:
    """One FlatBatch; the rows of an item are causal, and each item has a context of its own."""
    items, tokens = len(rows), [t for r in rows for t in r.tokens]
    ids, numbers, ptr = np.array(tokens, np.int64), _numbers(items), _numbers(items + 1)
    if items == 1:
        context, slots = rows[0].context, rows[0].slots
    else:
        context = np.concatenate([r.context for r in rows])
        slots = np.concatenate([r.slots for r in rows])
    lengths = accumulate([len(r.context) for r in rows], initial=0)
    context_ptr = np.array(list(lengths), np.int32)
    if len(tokens) == items:
        at = np.array([r.position for r in rows], np.int32)
        return FlatBatch(ids, at, slots, numbers, context, context_ptr, numbers, ptr, numbers)
    sizes = [len(r.tokens) for r in rows]
    starts = [0, *accumulate(sizes)]
    local = np.concatenate([s + _triangle(n) for s, n in zip(starts, sizes, strict=False)])
    counts = accumulate([i for n in sizes for i in range(1, n + 1)], initial=0)
    at = np.array([r.position + i for r in rows for i in range(len(r.tokens))], np.int32)
    return FlatBatch(
        ids, at, slots, np.repeat(numbers, sizes), context, context_ptr, local,
        np.array(list(counts), np.int32), np.array(starts[1:], np.int32) - 1,
    )


@lru_cache(maxsize=64)
def _triangle(n: int) -> np.ndarray:
    """int32: 0, 0 1, 0 1 2, ...: what each of n causal rows sees."""
    return np.tril_indices(n)[1].astype(np.int32)


@lru_cache(maxsize=256)
def _numbers(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int32)
