"""Structured attention (Multiverse): texts with parallel blocks, trained with the mask and positions that serving has.

A place sees what stands before it in its example, but for the siblings of the paths that it is in; positions of
siblings are equal, and what follows goes on behind the furthest of them (``outline.Grammar.layout``). Judged are the
tokens that the model writes: not the prompt, and not what the engine forces. Legend of shapes: b rows, t places,
D depth of nesting, k judged places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.errors import InputError, OptionError
from stretto.outline import Grammar, Layout, StructureError
from stretto.training.objectives import Loss, Net

__all__ = ["SpanBatch", "SpanDocument", "StructuredAttention", "checked", "pack_spans"]


@dataclass(frozen=True, slots=True)
class SpanDocument:
    """One example: ``tokens`` of which the first ``prompt`` are given; ``layout``: of all of them."""

    tokens: Sequence[int]
    prompt: int
    layout: Layout


def checked(grammar: Grammar, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[SpanDocument]:
    """Documents of (prompt ids, answer ids). Raises InputError that names the index of the pair and the reason."""
    out = []
    for i, (prompt, answer) in enumerate(pairs):
        tokens = [*prompt, *answer]
        try:
            out.append(SpanDocument(tokens, len(prompt), grammar.layout(tokens, start=len(prompt))))
        except StructureError as e:
            raise InputError(f"example {i}: {e}") from e
    return out


@dataclass(frozen=True, slots=True)
class SpanBatch:
    """Packed rows; padding has ``docs`` = -1."""

    tokens: Tensor  # int64 [b, t]
    docs: Tensor  # int64 [b, t] number of the example within its row
    positions: Tensor  # int64 [b, t]
    gaps: Tensor  # int64 [b, t, D, 2] place j is hidden from the places [a, b) of each gap
    judged: Tensor  # bool [b, t]

    def to(self, device: torch.device | str) -> SpanBatch:
        return SpanBatch(*(getattr(self, f.name).to(device) for f in fields(self)))

    def mask(self) -> Tensor:
        """bool [b, t, t]: place i sees place j."""
        at = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        seen = (self.docs[:, :, None] == self.docs[:, None, :]).tril()
        for level in self.gaps.unbind(2):
            first, last = level[:, None, :, 0], level[:, None, :, 1]
            seen &= (at[None, :, None] < first) | (at[None, :, None] >= last)
        return seen


def pack_spans(documents: Sequence[SpanDocument], length: int, *, pad_id: int) -> SpanBatch:
    """Rows of ``length`` holding every document, best fit by decreasing length. Raises OptionError for one too long."""
    rows: list[list[SpanDocument]] = []
    free: list[int] = []
    for doc in sorted(documents, key=lambda d: -len(d.tokens)):
        n = len(doc.tokens)
        if n > length:
            raise OptionError("length", length, f"at least {n}, the tokens of the longest example")
        fits = [i for i, room in enumerate(free) if room >= n]
        if not fits:
            rows.append([])
            free.append(length)
        best = min(fits, key=free.__getitem__) if fits else len(rows) - 1
        rows[best].append(doc)
        free[best] -= n
    return _fill(rows, length, pad_id)


def _fill(rows: list[list[SpanDocument]], length: int, pad_id: int) -> SpanBatch:
    depth = max((d.layout.gaps.shape[1] for row in rows for d in row), default=1)
    shape = (len(rows), length)
    tokens, docs, positions = torch.full(shape, pad_id), torch.full(shape, -1), torch.full(shape, 0)
    gaps, judged = torch.zeros((*shape, depth, 2), dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for r, row in enumerate(rows):
        at = 0
        for d, doc in enumerate(row):
            n, lay = len(doc.tokens), doc.layout
            here = (r, slice(at, at + n))
            tokens[here], docs[here], positions[here] = torch.tensor(doc.tokens), d, torch.from_numpy(lay.positions)
            gaps[r, at : at + n, : lay.gaps.shape[1]] = torch.from_numpy(lay.gaps) + at
            judged[here] = torch.from_numpy(~lay.forced)
            judged[r, at : at + doc.prompt] = False
            at += n
    return SpanBatch(tokens, docs, positions, gaps, judged)


@dataclass(frozen=True, slots=True)
class StructuredAttention:
    """Mean cross-entropy of the judged tokens, each by the law at the place before it."""

    def __call__(self, net: Net, batch: SpanBatch, generator: torch.Generator) -> Loss:
        hidden = net.hidden(batch.tokens, batch.positions, batch.mask())
        judged = batch.judged[:, 1:]
        loss_k = F.cross_entropy(net.logits(hidden[:, :-1][judged]), batch.tokens[:, 1:][judged], reduction="none")
        return Loss(loss_k.mean(), len(loss_k))
