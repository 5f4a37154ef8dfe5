"""Draft trees: a step's rows as arrays, and which static tree is worth most.

Node 0 is the root: the last final token, which is not cached yet. ``parent[i] < i``; a chain has parent[i] = i - 1.
Statistics of a drafter are ``acc[d][r]`` = P(the child of rank r at depth d + 1 is right | its parent is right), and
the value of a tree is the sum over its nodes of the product of acc along their paths, the root counting 1: the
expected number of tokens of a step (Sequoia, arXiv 2402.12374, section 3).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from stretto.engine.types import Sequence, Step

__all__ = ["Shape", "Tree", "best_first", "chain", "depth_limited_value"]


@dataclass(slots=True)
class Tree:
    """A token tree under construction; identical siblings become one node."""

    tokens: list[int]
    parent: list[int] = field(default_factory=lambda: [-1])
    depth: list[int] = field(default_factory=lambda: [0])
    _child: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def rooted(cls, token: int) -> Tree:
        return cls([token])

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int) -> int:
        """The number of the node ``token`` under ``parent``, made when there is none."""
        key = (parent, token)
        node = self._child.get(key)
        if node is None:
            node = self._child[key] = len(self.tokens)
            self.tokens.append(token)
            self.parent.append(parent)
            self.depth.append(self.depth[parent] + 1)
        return node

    def path(self, node: int) -> list[int]:
        """Nodes from the first draft down to ``node``; empty for the root."""
        out = []
        while node > 0:
            out.append(node)
            node = self.parent[node]
        return out[::-1]

    def prefix(self, nodes: int) -> Tree:
        """The tree of the first ``nodes`` nodes; no more can be added."""
        return Tree(self.tokens[:nodes], self.parent[:nodes], self.depth[:nodes])

    def step(self, seq: Sequence, extra: Any = None) -> Step:
        """The step that evaluates every node; a chain asks for plain causal rows."""
        if self.depth[-1] == len(self.tokens) - 1:
            return Step(self.tokens, extra=extra)
        root = seq.computed
        return Step(self.tokens, [root + d for d in self.depth], self.parent, extra=extra)


@dataclass(frozen=True, slots=True)
class Shape:
    """A static tree without its root. Node i (1-based, as in ``Tree``) is the child of rank ``rank[i-1]`` of
    ``parent[i-1]``; ``gain[i-1]`` is its path product. Every prefix is a tree, the best of its size."""

    parent: tuple[int, ...]
    rank: tuple[int, ...]
    depth: tuple[int, ...]
    gain: tuple[float, ...]

    @property
    def value(self) -> float:
        """Expected tokens of a step."""
        return 1.0 + sum(self.gain)


def chain(gains: Seq[float]) -> Shape:
    """The chain with these path products."""
    n = len(gains)
    numbers = tuple(range(n + 1))
    return Shape(numbers[:-1], (0,) * n, numbers[1:], tuple(gains))


def best_first(acc: Seq[Seq[float]], nodes: int, depth: int | None = None) -> Shape:
    """The best tree of at most ``nodes`` drafts (the root not counted) and ``depth`` levels below the root.

    ``acc[d]`` falls with the rank. Products fall along every path and with the rank, so the nodes with the largest
    products form a tree, and taking them one after the other from a heap is optimal for every size at once.
    """
    levels = len(acc) if depth is None else min(depth, len(acc))
    parent, rank, depths, gain = [], [], [], []
    heap = [(-acc[0][0], 0, 0, 0, 1.0)] if levels and acc[0] and nodes else []
    order = 1  # first made, first taken, among equals
    while heap and len(gain) < nodes:
        value, _, above, r, base = heapq.heappop(heap)
        d = depths[above - 1] if above else 0
        parent.append(above)
        rank.append(r)
        depths.append(d + 1)
        gain.append(-value)
        if r + 1 < len(acc[d]):
            heapq.heappush(heap, (-base * acc[d][r + 1], order, above, r + 1, base))
        if d + 1 < levels and acc[d + 1]:
            heapq.heappush(heap, (value * acc[d + 1][0], order + 1, len(gain), 0, -value))
        order += 2
    return Shape(tuple(parent), tuple(rank), tuple(depths), tuple(gain))


def depth_limited_value(acc: Seq[float], nodes: int, levels: int) -> float | None:
    """Sequoia's dynamic program: the best value with exactly ``nodes`` nodes, root included, in ``levels`` levels.

    ``acc[b]``: acceptance of the child of rank b, the same at every depth. None when no such tree exists.
    T(m, l, b) = max over y of T(y, l, b-1) + acc[b] B(m - y, l - 1), T(1, l, 0) = 1, B = max over b of T.
    """
    none = float("-inf")

    @cache
    def best(m: int, l: int) -> float:
        return max((first(m, l, b) for b in range(len(acc) + 1)), default=none)

    @cache
    def first(m: int, l: int, b: int) -> float:
        """Value with ``m`` nodes when the root has exactly its first ``b`` children."""
        if l < 1 or m < 1:
            return none
        if b == 0:
            return 1.0 if m == 1 else none
        return max(
            (first(y, l, b - 1) + acc[b - 1] * best(m - y, l - 1) for y in range(1, m)), default=none
        )

    value = best(nodes, levels)
    return None if value == none else value
