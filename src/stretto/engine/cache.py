"""Who owns which slot: the allocator, the view of a sequence, and the prefix cache. No tensor is touched here.

A *slot* is one row of the K/V pool. A *segment* is an immutable run of slots with a reference count. A *view* is
what one sequence has cached, in logical order: shared segments first, then slots of its own. Fork freezes the own
slots into a segment; truncation and compaction rewrite the table; keys and values never move.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from stretto.errors import CapacityError, UnsupportedError

__all__ = ["PrefixCache", "Segment", "SlotAllocator", "View"]


class SlotAllocator:
    """A stack of free slots. Slots handed out together are ascending while the pool is fresh.

    ``shares``: a slot may have several owners (prefixes, forks)."""

    shares = True

    def __init__(self, slots: int):
        self.total = slots
        self.peak = 0  # most slots that were used at one time
        self._free = np.arange(slots - 1, -1, -1, dtype=np.int32)
        self._out = np.empty(0, np.int32)  # out of service
        self._n = slots

    @property
    def free(self) -> int:
        return self._n

    @property
    def used(self) -> int:
        return self.total - self._n

    @property
    def longest(self) -> int:
        """Rows that one sequence may have."""
        return self.total

    @property
    def most(self) -> int:
        """Sequences that may have rows at the same time."""
        return self.total

    def room(self, view: View) -> int:
        """Rows that ``view`` can get now."""
        return self._n

    def settle(self, view: View, at: int, slots: np.ndarray) -> np.ndarray:
        """The slots of rows that stay, at the logical places ``at``, ... of ``view``: here any slot will do."""
        return slots

    def tidy(self) -> None:
        """Between two steps: nothing to close up here."""

    def alloc(self, n: int, view: View | None = None) -> np.ndarray:
        """int32 [n]; raises CapacityError when fewer are free."""
        if n > self._n:
            raise CapacityError(f"{n} cache slots wanted, {self._n} of {self.total} are free")
        self._n -= n
        self.peak = max(self.peak, self.total - self._n)
        return self._free[self._n : self._n + n][::-1].copy()

    def limit(self, slots: int) -> None:
        """Hand out at most ``slots`` from now on; a larger number later brings slots back. Memory of a slot that was
        never handed out is never touched.

        CapacityError when more than that are in use, or there are not so many.
        """
        most = self.total + len(self._out)
        if not max(1, self.used) <= slots <= most:
            raise CapacityError(f"{slots} cache slots are not a possible limit: {self.used} of {most} are in use")
        change, n = slots - self.total, self._n
        if change < 0:
            self._out = np.concatenate([self._out, self._free[:-change]])
            self._free[: n + change] = self._free[-change:n].copy()
        else:
            self._free[change : change + n] = self._free[:n].copy()
            self._free[:change] = self._out[len(self._out) - change :]
            self._out = self._out[: len(self._out) - change]
        self._n += change
        self.total = slots

    def release(self, slots: np.ndarray) -> None:
        n = len(slots)
        if self._n + n > self.total:
            raise AssertionError("slots released twice")
        self._free[self._n : self._n + n] = slots[::-1]
        self._n += n


class Segment:
    """An immutable run of slots that several owners share."""

    __slots__ = ("refs", "slots")

    def __init__(self, slots: np.ndarray, refs: int = 1):
        self.slots = slots
        self.refs = refs


class View:
    """The cached rows of one sequence, in logical order."""

    __slots__ = ("_alloc", "_flat", "_n", "_shared", "_shared_n")

    def __init__(self, alloc: SlotAllocator, capacity: int = 64):
        self._alloc = alloc
        self._flat = np.empty(capacity, np.int32)
        self._n = 0
        self._shared: list[tuple[Segment, int]] = []  # (segment, visible length)
        self._shared_n = 0

    def __len__(self) -> int:
        return self._n

    @property
    def slots(self) -> np.ndarray:
        """int32 [len]; a view of internal storage, valid until the next change."""
        return self._flat[: self._n]

    @property
    def shared(self) -> int:
        """How many leading rows belong to shared segments."""
        return self._shared_n

    def append(self, slots: np.ndarray) -> None:
        """Take ownership of ``slots`` behind the last row."""
        n = self._n + len(slots)
        if n > len(self._flat):
            grown = np.empty(max(n, 2 * len(self._flat)), np.int32)
            grown[: self._n] = self._flat[: self._n]
            self._flat = grown
        self._flat[self._n : n] = slots
        self._n = n

    def attach(self, segment: Segment, length: int | None = None) -> None:
        """Append the first ``length`` rows of a shared segment; own rows before it become a segment."""
        self.freeze(self._n)
        length = len(segment.slots) if length is None else length
        segment.refs += 1
        self._shared.append((segment, length))
        self.append(segment.slots[:length])
        self._shared_n = self._n

    def join(self, child: View, start: int) -> None:
        """Append the rows of ``child`` from ``start`` (where it was forked) on, shared: join mode "share"."""
        child.freeze(len(child))
        at = 0
        for segment, n in child._shared:
            if at >= start:
                self.attach(segment, n)
            at += n

    def truncate(self, length: int) -> None:
        """Forget every row from ``length`` on; shared slots stay with their segments."""
        if not 0 <= length <= self._n:
            raise AssertionError(f"truncate to {length} of {self._n}")
        own = max(length, self._shared_n)
        self._alloc.release(self._flat[own : self._n].copy())
        self._n = length
        while self._shared_n > length:
            segment, n = self._shared.pop()
            start = self._shared_n - n
            if start < length:
                self._shared.append((segment, length - start))
                self._shared_n = length
            else:
                self._drop(segment)
                self._shared_n = start

    def replace(self, start: int, slots: np.ndarray) -> None:
        """Put ``slots`` in the place of the rows from ``start`` on; those rows must be the view's own."""
        stop = start + len(slots)
        if start < self._shared_n or stop > self._n:
            raise AssertionError("replace outside the own rows")
        self._alloc.release(self._flat[start:stop].copy())
        self._flat[start:stop] = slots

    def freeze(self, length: int) -> Segment | None:
        """Turn the own rows up to ``length`` into a shared segment of this view; None when there are none."""
        if length <= self._shared_n:
            return None
        segment = Segment(self._flat[self._shared_n : length].copy())
        self._shared.append((segment, length - self._shared_n))
        self._shared_n = length
        return segment

    def shift(self, by: int) -> None:
        """The own rows were moved in the pool, ``by`` slots on."""
        self._flat[: self._n] += by

    def fork(self) -> View:
        """A second view of the same rows; nothing is copied but slot numbers. UnsupportedError where slots have one
        owner."""
        if not self._alloc.shares:
            raise UnsupportedError(
                "kv_layout='slots' cannot fork or share a prefix: load the model with kv_layout='paged'"
            )
        self.freeze(self._n)
        child = View(self._alloc, max(64, self._n + 32))
        for segment, n in self._shared:
            segment.refs += 1
            child._shared.append((segment, n))
        child._flat[: self._n] = self._flat[: self._n]
        child._n = child._shared_n = self._n
        return child

    def adopt(self, other: View) -> None:
        """Become a second view of the rows of ``other``; the own ones are given back."""
        fork = other.fork()
        self.release()
        self._flat, self._n = fork._flat, fork._n
        self._shared, self._shared_n = fork._shared, fork._shared_n

    def release(self) -> None:
        """Give everything back; the view is empty afterwards."""
        self.truncate(0)

    def _drop(self, segment: Segment) -> None:
        segment.refs -= 1
        if segment.refs == 0:
            self._alloc.release(segment.slots)


class PrefixCache:
    """Finished prompt blocks by the hash of everything before them; least recently used blocks go first.

    The key of block i is H(key of block i-1, token ids of the block); the root key holds ``salt`` (tenant,
    adapter, model). 128-bit hashes. Only final tokens are ever inserted.
    """

    def __init__(self, alloc: SlotAllocator, block: int = 16):
        self.block = block
        self.hits = self.queries = 0
        self._alloc = alloc
        self._blocks: OrderedDict[bytes, Segment] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def slots(self) -> int:
        return len(self._blocks) * self.block

    def keys(self, tokens: Sequence[int], salt: str, blocks: int) -> list[bytes]:
        data = np.asarray(tokens[: blocks * self.block], np.int64).tobytes()
        step = 8 * self.block
        key, out = hashlib.blake2b(salt.encode(), digest_size=16).digest(), []
        for i in range(blocks):
            key = hashlib.blake2b(key + data[i * step : (i + 1) * step], digest_size=16).digest()
            out.append(key)
        return out

    def attach(self, view: View, tokens: Sequence[int], salt: str, limit: int) -> int:
        """Attach the longest cached prefix of at most ``limit`` rows to an empty view; its length."""
        blocks = min(len(tokens), limit) // self.block
        self.queries += len(tokens)
        found = []
        for key in self.keys(tokens, salt, blocks):
            segment = self._blocks.get(key)
            if segment is None:
                break
            found.append(key)
            view.attach(segment)
        self._touch(found)
        self.hits += len(view)
        return len(view)

    def insert(self, view: View, tokens: Sequence[int], salt: str, length: int) -> None:
        """Share the full blocks of the view's first ``length`` rows, whose tokens are final."""
        blocks = length // self.block
        keys = self.keys(tokens, salt, blocks)
        for i, key in enumerate(keys):
            if key in self._blocks:
                if view.shared < (i + 1) * self.block:
                    return  # another sequence computed the same block: keep ours private
                continue
            if view.shared != i * self.block:
                return  # the block lies inside a longer shared run of a fork
            segment = view.freeze((i + 1) * self.block)
            if segment is None:
                return
            segment.refs += 1
            self._blocks[key] = segment
        self._touch(keys)

    def _touch(self, keys: list[bytes]) -> None:
        """Mark as used just now, the deepest block as the oldest: a chain is evicted from its end."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def evict(self, wanted: int) -> int:
        """Free at least ``wanted`` slots if unused blocks hold them; how many were freed."""
        freed = 0
        for key in [k for k, s in self._blocks.items() if s.refs == 1]:
            if freed >= wanted:
                break
            segment = self._blocks.pop(key)
            self._alloc.release(segment.slots)
            freed += len(segment.slots)
        return freed
