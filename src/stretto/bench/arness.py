"""How sequential a decoder really is: the order in which it made its tokens final (NAP, arXiv 2602.23225).

Legend: n tokens at positions 0..n-1. An *order* lists positions as they became final; a *step map* names for each
position the forward that decided it. Plain decoding has 1.0 in every measure.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["global_arness", "local_arness", "order_of", "set_arness"]


def order_of(step_map: Sequence[int], confidence: Sequence[float] | None = None) -> list[int]:
    """Positions by forward; inside a forward by falling confidence, or from the left where none is known."""
    rank = [0.0] * len(step_map) if confidence is None else [-c for c in confidence]
    return sorted(range(len(step_map)), key=lambda i: (step_map[i], rank[i], i))


def global_arness(order: Sequence[int], k: int = 1) -> float:
    """Share of tokens that were among the k leftmost positions still open when they became final."""
    _check(order, k)
    left = sorted(order)
    hits = 0
    for at in order:
        hits += at in left[:k]
        left.remove(at)
    return hits / len(order)


def local_arness(order: Sequence[int], k: int = 1) -> float:
    """Share of tokens whose k predecessors in position were the last k to become final, in order.

    Counted over the tokens that can have them: those decided k-th or later at position k or later.
    """
    _check(order, k)
    found = [
        list(order[i - k : i]) == [at - k + j for j in range(k)]
        for i, at in enumerate(order) if i >= k and at >= k
    ]
    return sum(found) / len(found) if found else 1.0


def set_arness(step_map: Sequence[int]) -> float:
    """For forwards that decide several tokens: share of tokens that lie in the leftmost |forward| open positions."""
    if not step_map:
        raise ValueError("an order of no tokens has no measure")
    left, hits = list(range(len(step_map))), 0
    for step in sorted(set(step_map)):
        mine = [i for i in left if step_map[i] == step]
        hits += len(set(mine) & set(left[: len(mine)]))
        left = [i for i in left if step_map[i] != step]
    return hits / len(step_map)


def _check(order: Sequence[int], k: int) -> None:
    if sorted(order) != list(range(len(order))) or not order:
        raise ValueError("an order must list every position 0..n-1 once, and at least one")
    if k < 1:
        raise ValueError(f"k={k}: at least 1")
