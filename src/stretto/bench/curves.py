"""Figures of speed-quality curves: AUP, parallel budgets, and rank correlations of decoding orders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["aup", "budget", "kendall", "spearman"]

Point = tuple[float, float]  # (tokens per forward, accuracy in per cent)


def aup(points: Sequence[Point], best: float) -> float:
    """Accuracy under parallelism (d3LLM, 2026): the area under accuracy over tokens per forward, where accuracy below
    ``best`` (the best of any method compared, per cent) counts exp(-3 (1 - y / best)) of itself.

    Points more than five percentage points below the slowest one are dropped.
    """
    ordered = sorted(points)
    if not ordered or best <= 0:
        return 0.0
    kept = [(x, y) for x, y in ordered if y >= ordered[0][1] - 5]

    def worth(y: float) -> float:
        return y * min(math.exp(-3 * (1 - y / best)), 1.0)

    area = kept[0][0] * kept[0][1]
    for (x0, y0), (x1, y1) in pairwise(kept):
        area += 0.5 * (x1 - x0) * (worth(y0) + worth(y1))
    return area


def budget(points: Sequence[Point], floor: float) -> float | None:
    """The most tokens per forward at which accuracy is still at least ``floor`` per cent; None: nowhere."""
    good = [x for x, y in points if y >= floor]
    return max(good, default=None)


def kendall(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b; None where one of the two is constant."""
    signs = [
        ((a[i] > a[j]) - (a[i] < a[j]), (b[i] > b[j]) - (b[i] < b[j])) for i in range(len(a)) for j in range(i)
    ]
    x, y = sum(s != 0 for s, _ in signs), sum(t != 0 for _, t in signs)
    return sum(s * t for s, t in signs) / math.sqrt(x * y) if x and y else None


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Correlation of ranks, ties at their mean rank; None where one of the two is constant."""
    x, y = _ranks(a), _ranks(b)
    n = len(x)
    if n < 2:
        return None
    mx, my = sum(x) / n, sum(y) / n
    vx, vy = sum((i - mx) ** 2 for i in x), sum((i - my) ** 2 for i in y)
    if not vx or not vy:
        return None
    return sum((i - mx) * (j - my) for i, j in zip(x, y, strict=True)) / math.sqrt(vx * vy)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    out = [0.0] * len(values)
    i = 0
    while i < len(order):
        j = i
        while j + 1 < len(order) and values[order[j + 1]] == values[order[i]]:
            j += 1
        for k in range(i, j + 1):
            out[order[k]] = (i + j) / 2
        i = j + 1
    return out
