"""Training batches: examples packed into rows of a fixed length, resumable at any batch.

Several examples share a row and never see each other: ``docs`` names the example of every place. A fixed shape costs
no padding to the longest and is compiled once. Legend of shapes: b rows, t places of a row, q places of the
noisy stream (block diffusion only).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["Document", "PackedBatch", "PackedData", "pack"]


@dataclass(frozen=True, slots=True)
class Document:
    """One example: ``tokens`` of which the first ``prompt`` are given and the rest are to be learnt."""

    tokens: Sequence[int]
    prompt: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A batch of packed rows; padding has ``docs`` = -1."""

    tokens: Tensor  # int64 [b, t]
    docs: Tensor  # int64 [b, t] number of the example within its row, -1 = padding
    positions: Tensor  # int64 [b, t] position within the example
    answer: Tensor  # bool [b, t] places of the answer, end-of-text included

    def to(self, device: torch.device | str) -> PackedBatch:
        return PackedBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


def pack(documents: Sequence[Document], length: int, *, pad_id: int) -> PackedBatch:
    """Rows of ``length`` holding every document, best fit by decreasing length.

    Raises ``ValueError`` for a document longer than a row.
    """
    rows: list[list[Document]] = []
    free: list[int] = []
    for doc in sorted(documents, key=lambda d: -len(d.tokens)):
        n = len(doc.tokens)
        if n > length:
            raise ValueError(f"a document has {n} tokens, a row {length}: use longer rows")
        fits = [i for i, room in enumerate(free) if room >= n]
        if fits:
            best = min(fits, key=free.__getitem__)
        else:
            best = len(rows)
            rows.append([])
            free.append(length)
        rows[best].append(doc)
        free[best] -= n
    return _fill(rows, length, pad_id)


def _fill(rows: list[list[Document]], length: int, pad_id: int) -> PackedBatch:
    tokens, docs, positions, answer = [], [], [], []
    for row in rows:
        left = length - sum(len(d.tokens) for d in row)
        tokens.append([t for d in row for t in d.tokens] + [pad_id] * left)
        docs.append([i for i, d in enumerate(row) for _ in d.tokens] + [-1] * left)
        positions.append([j for d in row for j in range(len(d.tokens))] + [0] * left)
        answer.append([j >= d.prompt for d in row for j in range(len(d.tokens))] + [False] * left)
    return PackedBatch(torch.tensor(tokens), torch.tensor(docs), torch.tensor(positions), torch.tensor(answer))


class PackedData:
    """An endless, resumable supply of batches of ``rows`` rows.

    ``pool(k)`` gives the documents of pool number k and depends on k alone, so that the place in the data is the
    pair (pool, batch within it). The rows of a pool are shuffled with a generator seeded by (seed, k).
    """

    def __init__(
        self, pool: Callable[[int], Sequence[Document]], *, rows: int, length: int, pad_id: int, seed: int = 0,
    ):
        self._pool, self.rows, self.length, self.pad_id, self.seed = pool, rows, length, pad_id, seed
        self.position = (0, 0)

    def _batches(self, k: int) -> list[PackedBatch]:
        packed = pack(self._pool(k), self.length, pad_id=self.pad_id)
        order = torch.randperm(len(packed.tokens), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + k))
        used = len(order) - len(order) % self.rows or len(order)
        return [
            PackedBatch(packed.tokens[i], packed.docs[i], packed.positions[i], packed.answer[i])
            for i in order[:used].split(self.rows)
        ]

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            k, i = self.position
            batches = self._batches(k)
            while i < len(batches):
                self.position = (k, i + 1)
                yield batches[i]
                i += 1
            self.position = (k + 1, 0)
