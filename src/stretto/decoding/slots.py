"""Slots: rows that hang on the nodes of a draft tree and guess what follows them. How many, and on which nodes.

A node that carries n slots gives n laws: slot i of the node at position p estimates the token at p + i + 1. If the node
is the last accepted one, its laws are the *state* of the next step: the candidates at depth d are the best tokens of
law d. So what a slot is worth shows one step later, and a plan is a Markov chain over the states 0..k (no laws, ..,
k laws). (PPD, arXiv 2405.18628, section 4: dynamic sparse trees; here with the exact chain.)

``Kind`` = (share, acc): text comes in kinds that the drafter can tell apart, by how sure its laws are; ``acc[d][r]`` is
the probability that rank r of law d + 1 is right where its parent is. One kind gives the paper's planner. Two plans:

    fixed_plan   the paper's: the best trees of exactly B rows, N_s nodes in state s
    best_plan    as many rows as pay: the policy with the most tokens per second on a measured curve, found by Howard's
                 policy iteration for semi-Markov decision processes; one row without slots is among its choices

Free of torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from stretto.decoding.tree import Shape, best_first
from stretto.errors import OptionError

__all__ = [
    "Kind", "Plan", "Price", "SlotTree", "best_plan", "best_tree", "evaluate", "fixed_plan", "group_mask", "own",
    "spread",
]

Kind = tuple[float, Seq[Seq[float]]]  # share of the text, acc[d][r]
MASKS = ("ensemble", "decoder", "encoder")
ROUNDS = 12  # of policy iteration, at most


@dataclass(frozen=True, slots=True)
class SlotTree:
    """The rows of a step: node 0 is the root, node i the child of rank ``rank[i - 1]`` of ``parent[i - 1]``.

    ``slots[i]``: how many slots node i carries. ``gain[i - 1]``: probability that node i is right.
    """

    parent: tuple[int, ...]
    rank: tuple[int, ...]
    depth: tuple[int, ...]
    gain: tuple[float, ...]
    slots: tuple[int, ...]

    @classmethod
    def of(cls, shape: Shape, nodes: int, slots: Seq[int]) -> SlotTree:
        """The first ``nodes`` nodes of ``shape`` below the root, with ``slots``."""
        return cls(shape.parent[:nodes], shape.rank[:nodes], shape.depth[:nodes], shape.gain[:nodes], tuple(slots))

    @property
    def nodes(self) -> int:
        """Nodes, the root included."""
        return len(self.slots)

    @property
    def rows(self) -> int:
        return len(self.slots) + sum(self.slots)


SINGLE = SlotTree((), (), (), (), (0,))  # plain decoding


@dataclass(frozen=True, slots=True)
class Plan:
    """``trees[s][j]``: the tree in state s on text of kind j. ``rate``: tokens per second, ``tokens`` per step,
    ``rows`` per step in the long run; ``law[s]``: share of the steps in state s; ``worth[s]``: what being in state s
    is worth in tokens, against state 0."""

    trees: tuple[tuple[SlotTree, ...], ...]
    rate: float
    tokens: float
    rows: float
    law: tuple[float, ...]
    worth: tuple[float, ...]


def group_mask(k: int, members: int, kind: str) -> np.ndarray:
    """Who sees whom among the slots of one node: bool [k, members, k, members], itself included.

    A slot is the mean of its members, which share a position. "ensemble": member j sees the members j of earlier slots.
    "decoder": all members of earlier slots, and earlier ones of its own. "encoder": all members up to its own slot.
    """
    if kind not in MASKS:
        raise OptionError("mask", kind, ", ".join(MASKS))
    i, j = (x.reshape(-1, 1) for x in np.divmod(np.arange(k * members), members))
    if kind == "ensemble":
        seen = (i >= i.T) & (j == j.T)
    elif kind == "decoder":
        seen = (i > i.T) | ((i == i.T) & (j >= j.T))
    else:
        seen = i >= i.T
    return seen.reshape(k, members, k, members)


def own(tree: SlotTree | Shape) -> list[float]:
    """For every node the probability that it is the last accepted one; they sum to 1."""
    out = [1.0, *tree.gain]
    for p, gain in zip(tree.parent, tree.gain, strict=True):
        out[p] -= gain
    return out


def spread(last: Seq[float], worth: Seq[float], slots: int, *, least: int = 0) -> list[int]:
    """``slots`` slots over the nodes, for the largest sum of last[v] * worth[slots of v].

    The root gets all that it can have, every other node at least ``least``. ``worth[n]`` of n slots, 0..k, must be
    concave (differences fall), which makes taking the best increment each time optimal.
    """
    k = len(worth) - 1
    out = [k, *[least] * (len(last) - 1)]
    left = slots - sum(out)
    heap = [(-p * (worth[n + 1] - worth[n]), v) for v, (p, n) in enumerate(zip(last, out, strict=True)) if n < k]
    heapq.heapify(heap)
    while left > 0 and heap:
        _, v = heapq.heappop(heap)
        out[v] += 1
        left -= 1
        if out[v] < k:
            heapq.heappush(heap, (-last[v] * (worth[out[v] + 1] - worth[out[v]]), v))
    return out


def evaluate(trees: Seq[Seq[SlotTree]], shares: Seq[float], seconds: Seq[Seq[float]]) -> Plan:
    """The exact chain of these trees: its stationary law, tokens and seconds per step, and the worth of each state.

    Worth h and rate g solve  h_s = tokens_s - g seconds_s + sum_n P(n | s) h_n  with h_0 = 0.
    """
    states = len(trees)
    move, tokens, time, rows = np.zeros((states, states)), np.ones(states), np.zeros(states), np.zeros(states)
    for s, kinds in enumerate(trees):
        for share, tree, t in zip(shares, kinds, seconds[s], strict=True):
            tokens[s] += share * sum(tree.gain)
            time[s] += share * t
            rows[s] += share * tree.rows
            for p, n in zip(own(tree), tree.slots, strict=True):
                move[s, n] += share * p
    system = np.eye(states) - move
    system[:, 0] = time  # h_0 = 0: its column is free for the rate
    solved = np.linalg.solve(system, tokens)
    law = np.linalg.solve(np.vstack([(np.eye(states) - move.T)[1:], np.ones(states)]), [*[0.0] * (states - 1), 1.0])
    return Plan(
        tuple(map(tuple, trees)), float(solved[0]), float(law @ tokens), float(law @ rows), tuple(law.tolist()),
        (0.0, *solved[1:].tolist()),
    )  # fmt: skip


def fixed_plan(acc: Seq[Seq[float]], rows: int) -> Plan:
    """The paper's plan for a budget of ``rows`` rows a step, the root's slots among them: best N_1 .. N_k.

    In every state the root has k slots and the other nodes at least one. A coordinate search over the N_s, exhaustive
    in each. Its rate counts tokens per step. OptionError: too few rows for one candidate.
    """
    k = len(acc)
    least = k + 3
    if rows < least:
        raise OptionError("tree_budget", rows, f"at least {least}: the root, its {k} slots, a candidate and its slot")
    shapes = [best_first(acc[:s], (rows - 1 - k) // 2) for s in range(k + 1)]
    sizes = [0, *(max(1, len(shape.gain) // 2) for shape in shapes[1:])]
    best = _with_sizes(shapes, sizes, rows)
    while True:
        before = best.tokens
        for s in range(1, k + 1):
            for n in range(1, len(shapes[s].gain) + 1):
                tried = [*sizes[:s], n, *sizes[s + 1 :]]
                plan = _with_sizes(shapes, tried, rows)
                if plan.tokens > best.tokens + 1e-12:
                    best, sizes = plan, tried
        if best.tokens <= before + 1e-12:
            return best


def _with_sizes(shapes: Seq[Shape], sizes: Seq[int], rows: int) -> Plan:
    k = len(shapes) - 1
    worth = [sum(shape.gain[:n]) for shape, n in zip(shapes, sizes, strict=True)]
    worth = _concave(worth)
    trees = []
    for s, (shape, n) in enumerate(zip(shapes, sizes, strict=True)):
        if s == 0:
            trees.append([SlotTree((), (), (), (), (k,))])
            continue
        bare = SlotTree.of(shape, n, [0] * (n + 1))
        slots = spread(own(bare), worth, rows - 1 - n, least=1)
        trees.append([SlotTree.of(shape, n, slots)])
    return evaluate(trees, [1.0], [[1.0]] * (k + 1))


def _concave(worth: Seq[float]) -> list[float]:
    """The smallest concave sequence above ``worth`` through its first and last entry."""
    out = list(worth)
    hull = [0]
    for i in range(1, len(out)):
        while len(hull) > 1 and _slope(out, hull[-2], hull[-1]) <= _slope(out, hull[-2], i):
            hull.pop()
        hull.append(i)
    for a, b in pairwise(hull):
        for i in range(a + 1, b):
            out[i] = out[a] + _slope(out, a, b) * (i - a)
    return out


def _slope(x: Seq[float], a: int, b: int) -> float:
    return (x[b] - x[a]) / (b - a)


def best_plan(
    kinds: Seq[Kind], seconds: Seq[float], *, slot_rows: Seq[float] | None = None, nodes: int = 24,
    rows: int = 64, fixed: float = 0.0,
) -> Plan:
    """The plan with the most tokens per second.

    ``seconds[n]``: of a forward of n rows; ``fixed``: of every step besides. ``slot_rows[i]``: what slot i + 1 costs in
    rows (1, or less where it enters in mid-stack); ``nodes``, ``rows``: most candidates and rows of a step.
    """
    k, total = len(kinds[0][1]), sum(share for share, _ in kinds)
    shares = [share / total for share, _ in kinds]
    price = Price(seconds, fixed, [1.0] * k if slot_rows is None else list(slot_rows))
    shapes = [[best_first(acc[:s], min(nodes, rows - 1)) for _, acc in kinds] for s in range(k + 1)]
    worth, rate = [0.3 * s for s in range(k + 1)], 1.0 / price.of(SINGLE)
    best = plan = None
    for _ in range(ROUNDS):
        trees = tuple(tuple(best_tree(shape, worth, rate, price, rows) for shape in same) for same in shapes)
        if plan is not None and trees == plan.trees:
            break
        plan = evaluate(trees, shares, [[price.of(t) for t in same] for same in trees])
        best = plan if best is None or plan.rate > best.rate else best
        worth, rate = plan.worth, plan.rate
    plain = evaluate([[SINGLE] * len(kinds)] * (k + 1), shares, [[price.of(SINGLE)] * len(kinds)] * (k + 1))
    return plain if best is None or plain.rate >= best.rate else best


class Price:
    """Seconds of a step."""

    def __init__(self, seconds: Seq[float], fixed: float, slot_rows: Seq[float]):
        self.seconds, self.fixed, self.slots = list(seconds), fixed, slot_rows
        self.whole = all(c == 1.0 for c in slot_rows)
        self.after = [sum(slot_rows[:n]) for n in range(len(slot_rows) + 1)]  # of n slots, in rows

    def of(self, tree: SlotTree) -> float:
        return self(tree.nodes + sum(self.after[n] for n in tree.slots))

    def __call__(self, rows: float) -> float:
        n = int(rows)
        part, table = rows - n, self.seconds
        if n + 1 >= len(table):
            return self.fixed + table[-1] * rows / (len(table) - 1)
        return self.fixed + table[n] + part * (table[n + 1] - table[n])


def best_tree(shape: Shape, worth: Seq[float], rate: float, price: Price, rows: int) -> SlotTree:
    """The prefix of ``shape`` and its slots with the largest value: tokens now, what the state reached is worth, less
    ``rate`` tokens for every second. ``rows``: at most."""
    k, jumps = len(worth) - 1, _jumps(worth, price.after)
    last, gained = [1.0], 1.0
    best = (-1e30, 0, [0])
    for n in range(len(shape.gain) + 1):
        if n:
            gain = shape.gain[n - 1]
            last[shape.parent[n - 1]] -= gain
            last.append(gain)
            gained += gain
        if n + 1 > rows:
            break
        value, count = _fill(last, jumps, gained, rate, price, rows - 1 - n, k)
        if value > best[0] + 1e-12:
            best = (value, n, count)
        elif n > best[1] + 3:
            break
    return SlotTree.of(shape, best[1], best[2])


def _jumps(worth: Seq[float], after: Seq[float]) -> list[tuple[float, int, float]]:
    """Steps along the concave hull of worth over cost: (worth gained per row, slots then, rows of the step)."""
    hull = [0]

    def slope(a: int, b: int) -> float:
        return (worth[b] - worth[a]) / (after[b] - after[a]) if after[b] > after[a] else np.inf

    for i in range(1, len(worth)):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-2], i):
            hull.pop()
        hull.append(i)
    return [(slope(a, b), b, after[b] - after[a]) for a, b in pairwise(hull) if worth[b] > worth[a]]


def _fill(
    last: Seq[float], jumps: Seq[tuple[float, int, float]], gained: float, rate: float, price: Price, room: int,
    k: int,
) -> tuple[float, list[int]]:
    """The best slots for nodes that are last with probability ``last``: the value, and the slots of every node."""
    items = [(p * slope, v, n, cost) for v, p in enumerate(last) for slope, n, cost in jumps]
    items.sort(reverse=True)
    rows = float(len(last))
    best, picked, slots = gained - rate * price(rows), 0, [0] * len(last)
    value, used = gained, 0
    taken = []
    for gain, v, n, cost in items:
        used += n - slots[v]
        if used > room or gain <= 0:
            break
        slots[v] = n
        taken.append((v, n))
        value += gain * cost
        rows += cost
        now = value - rate * price(rows)
        if now > best:
            best, picked = now, len(taken)
    out = [0] * len(last)
    for v, n in taken[:picked]:
        out[v] = n
    return best, out
