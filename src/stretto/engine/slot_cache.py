"""The "slots" layout of the cache: every sequence in one contiguous region, all regions in one window (Flover, 2023).

The pool is R regions of ``length`` rows. A sequence's rows stand in logical order from the first row of its region on:
its keys are a dense run and those of the fused batch a strided view, ``pool[lo : hi + 1]``, that attention reads
without gathering (models/strided.py). A new sequence goes behind the window, before it, or into a hole. When one ends
inside the window, ``tidy`` closes the gap with the fewest moves that any contiguous placement needs: of the windows
of n = live regions, the first with the fewest live regions outside it; those move, in ascending order, into its free
places.

The price is stated by ``waste``: a region is reserved whole, whatever its sequence uses. Shared prefixes and forks
have no place here, since a row belongs to one region.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stretto.errors import CapacityError

__all__ = ["SlotCache", "moves"]


def moves(live: list[bool]) -> list[tuple[int, int]]:
    """(from, to) of the regions that move so that the live ones stand side by side; the fewest possible."""
    n = sum(live)
    best, start = n + 1, 0
    inside = sum(live[:n])
    for i in range(len(live) - n + 1):
        if n - inside < best:
            best, start = n - inside, i
        if i + n < len(live):
            inside += live[i + n] - live[i]
    outside = [i for i, alive in enumerate(live) if alive and not start <= i < start + n]
    free = [i for i in range(start, start + n) if not live[i]]
    return list(zip(outside, free, strict=True))


class SlotCache:
    """An allocator of the engine, for ``slots`` rows. ``copy(source, target)`` moves what belongs to rows and says how
    many bytes that was; ``compaction=False`` never closes up.

    ``moved`` and ``moved_bytes`` count what compaction cost; ``finished`` the regions given back.
    """

    shares = False  # no row has two owners

    def __init__(self, slots: int, regions: int, copy: Callable[..., int], *, compaction: bool = True):
        if regions < 1 or slots < regions:
            raise CapacityError(f"{regions} regions in a pool of {slots} rows: lower max_num_seqs")
        self.regions, self.length = regions, slots // regions
        self.total = self.regions * self.length
        self.moved = self.moved_bytes = self.finished = 0
        self._copy, self._compaction = copy, compaction
        self._count = np.zeros(regions, np.int64)  # rows handed out of each region
        self._views: dict[int, Any] = {}

    @property
    def live(self) -> list[bool]:
        return [bool(c) for c in self._count]

    @property
    def window(self) -> tuple[int, int]:
        """The first and the last live region; (0, -1) when there is none."""
        at = np.nonzero(self._count)[0]
        return (int(at[0]), int(at[-1])) if len(at) else (0, -1)

    @property
    def used(self) -> int:
        return int(self._count.sum())

    @property
    def longest(self) -> int:
        return self.length

    @property
    def most(self) -> int:
        return self.regions

    @property
    def free(self) -> int:
        """Rows of the regions that nobody has."""
        return int((self._count == 0).sum()) * self.length

    @property
    def waste(self) -> float:
        """Share of the reserved rows that hold nothing."""
        reserved = int((self._count > 0).sum()) * self.length
        return 1 - self.used / reserved if reserved else 0.0

    def room(self, view: Any) -> int:
        """Rows that ``view`` can get now: what is left of its region, or a free one."""
        if len(view):
            return self.length - len(view)
        return self.length if self.free else 0

    def alloc(self, n: int, view: Any = None) -> np.ndarray:
        """int32 [n]: the rows behind ``view``; without one, a run over free regions. CapacityError without room."""
        if view is None:
            return self._run(n)
        if n > self.room(view):
            raise CapacityError(f"{n} cache rows wanted, {self.room(view)} of a slot of {self.length} are left")
        region = int(view.slots[0]) // self.length if len(view) else self._place()
        self._views[region] = view
        self._count[region] += n
        start = region * self.length + len(view)
        return np.arange(start, start + n, dtype=np.int32)

    def release(self, slots: np.ndarray) -> None:
        if not len(slots):
            return
        regions, counts = np.unique(np.asarray(slots) // self.length, return_counts=True)
        self._count[regions] -= counts
        if (self._count < 0).any():
            raise AssertionError("slots released twice")
        for region in regions[self._count[regions] == 0]:
            self.finished += self._views.pop(int(region), None) is not None

    def settle(self, view: Any, at: int, slots: np.ndarray) -> np.ndarray:
        """Bring rows to their logical places ``at``, ... of ``view``; those that are there already stay."""
        if not len(slots):
            return slots
        region = int(view.slots[0] if len(view) else slots[0]) // self.length
        start = region * self.length + at
        target = np.arange(start, start + len(slots), dtype=np.int32)
        if not np.array_equal(target, slots):
            self._copy(slots, target)
        return target

    def tidy(self) -> None:
        """Close the window up; called between two steps, while no row is in flight."""
        lo, hi = self.window
        if not self._compaction or hi - lo + 1 == int((self._count > 0).sum()):
            return
        for source, target in moves(self.live):
            view = self._views.pop(source, None)
            if view is None:
                continue  # rows of nobody's sequence (a measurement)
            by = (target - source) * self.length
            self.moved_bytes += self._copy(view.slots.copy(), view.slots + by)
            view.shift(by)
            self._count[target], self._count[source] = self._count[source], 0
            self._views[target] = view
            self.moved += 1

    def _place(self) -> int:
        lo, hi = self.window
        if hi < lo:
            return 0
        if hi + 1 < self.regions:
            return hi + 1
        if lo > 0:
            return lo - 1
        holes = np.nonzero(self._count == 0)[0]
        if not len(holes):
            raise CapacityError(f"all {self.regions} slots are taken")
        return int(holes[0])

    def _run(self, n: int) -> np.ndarray:
        need = -(-n // self.length)
        for start in range(self.regions - need, -1, -1):
            if not self._count[start : start + need].any():
                slots = np.arange(start * self.length, start * self.length + n, dtype=np.int32)
                regions, counts = np.unique(slots // self.length, return_counts=True)
                self._count[regions] += counts
                return slots
        raise CapacityError(f"{n} rows side by side are not free in {self.regions} slots of {self.length}")
