"""Keys that lie at equal distances in the pool, read where they are: the cache layout "slots" (engine/slot_cache.py).

Legend: g contexts, m keys of the longest, S slots, G kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

__all__ = ["Strided", "strided"]


@dataclass(frozen=True, slots=True)
class Strided:
    """Context i has the slots ``start + i * step`` and the m - 1 behind it; those behind its own end must be masked."""

    start: int
    step: int
    g: int
    m: int

    def view(self, x: Tensor) -> Tensor:
        """[S, G, D] -> [g, m, G, D], without a copy"""
        a, b, c = x.stride()
        at = x.storage_offset() + self.start * a
        return x.as_strided((self.g, self.m, *x.shape[1:]), (self.step * a, a, b, c), at)


def strided(keys: Sequence[np.ndarray], m: int, slots: int) -> Strided | None:
    """The keys of contexts (each int [its length]) as a view of ``m`` columns; None where they do not lie so."""
    starts = [int(k[0]) for k in keys]
    step = starts[1] - starts[0] if len(starts) > 1 else m
    if step < m or starts[-1] + m > slots:
        return None
    if any(s != starts[0] + i * step for i, s in enumerate(starts)):
        return None
    if any(int(k[-1]) - int(k[0]) != len(k) - 1 or (np.diff(k) != 1).any() for k in keys):
        return None
    return Strided(starts[0], step, len(keys), m)
