"""Training packs of tries: texts that share a prefix are one tree of tokens, and every shared token is evaluated once.

The units of an example are root-to-leaf sequences. They are inserted into a trie and laid out depth first: a place sees
its ancestors and itself, its position is its depth, and the token of a place is judged by the law at its *parent's*
place (which is not the place before it where a branch begins). A token that several units produce counts once for each.
Equals separate samples in loss and gradients. Used for tool slots, reasoning threads and groups of rollouts.

Legend of shapes: b rows, t places, k judged places, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.errors import OptionError
from stretto.training.objectives import Loss, Net

__all__ = ["TrieBatch", "TrieData", "TrieLoss", "Unit", "logps", "pack_tries", "size_of"]


@dataclass(frozen=True, slots=True)
class Unit:
    """One root-to-leaf sequence: ``tokens``, of which those from ``learnt`` on are judged with ``weight`` each (an
    advantage may be negative)."""

    tokens: Sequence[int]
    learnt: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class TrieBatch:
    """Packed rows; padding has ``docs`` = -1."""

    tokens: Tensor  # int64 [b, t]
    docs: Tensor  # int64 [b, t] number of the example within its row
    positions: Tensor  # int64 [b, t] depth in the trie
    leave: Tensor  # int64 [b, t] first place of the row that is no descendant
    parent: Tensor  # int64 [b, t] place of the parent, -1 = a root
    weight: Tensor  # float32 [b, t] how much the token of the place counts: sum of the positive weights of its units
    against: Tensor  # float32 [b, t] and of the negative ones, without their sign

    def to(self, device: torch.device | str) -> TrieBatch:
        return TrieBatch(*(getattr(self, f.name).to(device) for f in fields(self)))

    def mask(self) -> Tensor:
        """bool [b, t, t]: place i sees place j, its ancestor or itself."""
        at = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        inside = (at[None, None, :] <= at[None, :, None]) & (at[None, :, None] < self.leave[:, None, :])
        return inside & (self.docs[:, :, None] == self.docs[:, None, :])


@dataclass(frozen=True, slots=True)
class TrieLoss:
    """Weighted mean of the cross-entropies of all judged tokens, each against the law at its parent."""

    def __call__(self, net: Net, batch: TrieBatch, generator: torch.Generator) -> Loss:
        judged = (batch.weight > 0) & (batch.parent >= 0)
        loss_k = -logps(net, batch, judged)
        weight_k = batch.weight[judged]
        return Loss((loss_k * weight_k).sum() / weight_k.sum(), len(loss_k))


def logps(net: Net, batch: TrieBatch, judged: Tensor) -> Tensor:
    """float [k]: log-probability of the token of every place of ``judged`` (bool [b, t]), by the law at its parent."""
    hidden = net.hidden(batch.tokens, batch.positions, batch.mask())
    row = torch.arange(len(judged), device=judged.device)[:, None].expand_as(judged)
    logits = net.logits(hidden[row[judged], batch.parent[judged]])
    return -F.cross_entropy(logits, batch.tokens[judged], reduction="none")


@dataclass(slots=True)
class _Node:
    token: int
    weight: float = 0.0
    against: float = 0.0
    children: dict[int, _Node] = field(default_factory=dict)


@dataclass(slots=True)
class _Flat:
    """One example, depth first."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    leave: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    against: list[float] = field(default_factory=list)


def flatten(units: Sequence[Unit]) -> _Flat:
    """The trie of ``units``, children in the order in which they were first seen."""
    root = _Node(-1)
    for unit in units:
        node = root
        for i, token in enumerate(unit.tokens):
            node = node.children.setdefault(int(token), _Node(int(token)))
            if i >= unit.learnt:
                node.weight += max(unit.weight, 0.0)
                node.against += max(-unit.weight, 0.0)
    out = _Flat()
    for child in root.children.values():
        _walk(child, -1, out)
    return out


def size_of(units: Sequence[Unit]) -> int:
    """Places that the trie of ``units`` takes."""
    return len(flatten(units).tokens)


def _walk(top: _Node, parent: int, out: _Flat) -> None:
    stack: list[tuple[_Node, int, bool]] = [(top, parent, False)]
    places: list[int] = []
    while stack:
        node, above, done = stack.pop()
        if done:
            out.leave[places.pop()] = len(out.tokens)
            continue
        at = len(out.tokens)
        places.append(at)
        out.tokens.append(node.token)
        out.positions.append(out.positions[above] + 1 if above >= 0 else 0)
        out.leave.append(-1)
        out.parent.append(above)
        out.weight.append(node.weight)
        out.against.append(node.against)
        stack.append((node, above, True))
        stack += [(child, at, False) for child in reversed(node.children.values())]


def pack_tries(examples: Sequence[Sequence[Unit]], length: int, *, pad_id: int) -> TrieBatch:
    """Rows of ``length`` holding every example, best fit by decreasing size. Raises OptionError for one too long."""
    flats = sorted((flatten(e) for e in examples), key=lambda f: -len(f.tokens))
    rows: list[list[_Flat]] = []
    free: list[int] = []
    for flat in flats:
        n = len(flat.tokens)
        if n > length:
            raise OptionError("length", length, f"at least {n}, the places of the largest example")
        fits = [i for i, room in enumerate(free) if room >= n]
        if not fits:
            rows.append([])
            free.append(length)
        best = min(fits, key=free.__getitem__) if fits else len(rows) - 1
        rows[best].append(flat)
        free[best] -= n
    return _fill(rows, length, pad_id)


def _fill(rows: list[list[_Flat]], length: int, pad_id: int) -> TrieBatch:
    shape = (len(rows), length)
    tokens, docs = torch.full(shape, pad_id), torch.full(shape, -1)
    positions, leave, parent = torch.full(shape, 0), torch.full(shape, 0), torch.full(shape, -1)
    weight, against = torch.zeros(shape), torch.zeros(shape)
    for r, row in enumerate(rows):
        at = 0
        for d, flat in enumerate(row):
            here = (r, slice(at, at + len(flat.tokens)))
            tokens[here], docs[here] = torch.tensor(flat.tokens), d
            positions[here], weight[here] = torch.tensor(flat.positions), torch.tensor(flat.weight)
            against[here] = torch.tensor(flat.against)
            leave[here] = torch.tensor(flat.leave) + at
            parent[here] = torch.tensor([p + at if p >= 0 else -1 for p in flat.parent])
            at += len(flat.tokens)
        leave[r, at:] = torch.arange(at, length) + 1
    return TrieBatch(tokens, docs, positions, leave, parent, weight, against)


class TrieData:
    """An endless, resumable supply of batches. ``pool(k)`` gives the examples of pool number k (lists of units, or what
    ``pack`` takes); ``after(k)``: the number of the pool that follows. ``length`` None: an example a row, those of a
    batch of like size (of lists of units only): less attention to what is not seen."""

    def __init__(
        self, pool: Callable[[int], Sequence[Any]], *, rows: int, length: int | None, pad_id: int, seed: int = 0,
        pack: Callable[..., Any] = pack_tries, after: Callable[[int], int] = lambda k: k + 1,
    ):
        self._pool, self.rows, self.length, self.pad_id, self.seed = pool, rows, length, pad_id, seed
        self._pack, self._after = pack, after
        self.position = (0, 0)

    def _batches(self, k: int) -> list[Any]:
        if self.length is None:
            return self._alike(k)
        packed = self._pack(self._pool(k), self.length, pad_id=self.pad_id)
        order = list(range(len(packed.tokens)))
        random.Random(f"{self.seed}/{k}").shuffle(order)
        used = len(order) - len(order) % self.rows or len(order)
        return [
            type(packed)(*(getattr(packed, f.name)[order[i : i + self.rows]] for f in fields(packed)))
            for i in range(0, used, self.rows)
        ]

    def _alike(self, k: int) -> list[Any]:
        sized = sorted(((size_of(e), i, e) for i, e in enumerate(self._pool(k))), key=lambda x: x[:2])
        groups = [sized[i : i + self.rows] for i in range(0, len(sized), self.rows)]
        random.Random(f"{self.seed}/{k}").shuffle(groups)
        return [self._pack([e for _, _, e in g], max(n for n, _, _ in g), pad_id=self.pad_id) for g in groups]

    def __iter__(self) -> Iterator[Any]:
        while True:
            k, i = self.position
            batches = self._batches(k)
            while i < len(batches):
                self.position = (k, i + 1)
                yield batches[i]
                i += 1
            self.position = (self._after(k), 0)
