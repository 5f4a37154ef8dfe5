"""The attention context of a FlatBatch: rows that write to the K/V pool and read it as the batch says.

Legend: n rows, A heads, G kv heads (R = A/G query heads share one), D head_dim, S slots.
Masks are bool, True = visible. ``attend`` gets q and k already rotated.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.errors import UnsupportedError
from stretto.models.batch import EarlyLogits, FlatBatch, ForwardResult, KVPool
from stretto.models.context import masked_attention
from stretto.models.entries import check
from stretto.models.moe import shared_routing
from stretto.models.strided import Strided, strided
from stretto.models.turned import turned_rows

if TYPE_CHECKING:
    from stretto.models.config import ModelConfig
    from stretto.models.transformer import Transformer

__all__ = ["PoolContext", "forward_batch"]

ALONE_COLUMNS = 512  # float32 attention on CPUs works in column blocks of this size


@dataclass(slots=True)
class _Group:
    """Contexts whose rows are evaluated in one call: g of them, with r rows and m keys each (padded)."""

    rows: Tensor | slice  # int64 [g * r], or the slice of the batch it is
    shape: tuple[int, int, int]  # g, r, m
    keys: Tensor | slice | Strided  # int64 [g * m] slots, the slice of the pool it is, or a view of it
    visible: Tensor | None  # bool [g, r, m]; None = all
    causal: bool  # the mask is exactly lower triangular
    distance: Tensor | None  # int32 [g, r, m]: position of the row minus that of the key (sliding windows)


class PoolContext:
    """A FlatBatch on a KVPool: writes every row's keys and values to its slot, then reads as the
    batch says.

    Index and mask tensors are built once here, not per layer. ``rowwise``: every row attends alone, over its own keys
    in their order, padded to a multiple of 512 masked columns, so that its bits depend on nothing else (slower).
    """

    def __init__(self, pool: KVPool, batch: FlatBatch, config: ModelConfig, *, rowwise: bool = False):
        self.pool, self._windows = pool, config.windows
        device = pool.k.device
        pool.positions[batch.slots] = batch.positions
        self._slots = _run(batch.slots, device)
        self._distances = any(w is not None for w in config.windows)
        self._turned = list(turned_rows(batch, config, device, alone=rowwise))
        self._groups = _rows_alone(pool, batch, self._distances) if rowwise else _groups(pool, batch, self._distances)
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.pool.k[layer], self.pool.v[layer]
        keys[self._slots] = k.to(keys.dtype)
        values[self._slots] = v.to(values.dtype)
        out = None if self._alone else torch.empty_like(q)
        for rows in self._turned:
            assert out is not None
            out[rows.rows] = rows.attend(q, keys, values)
        for i, group in enumerate(self._groups):
            part = self._attend(i, group, layer, q, keys, values)
            if out is None:
                return part
            out[group.rows] = part
        return out

    @property
    def _alone(self) -> bool:
        """One group holds all rows, in order."""
        return len(self._groups) == 1 and not self._turned and isinstance(self._groups[0].rows, slice)

    def _attend(
        self, i: int, group: _Group, layer: int, q: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        g, r, m = group.shape
        if isinstance(group.keys, Strided):
            gathered = [group.keys.view(x).to(q.dtype) for x in (keys, values)]
        else:
            gathered = [x[group.keys].to(q.dtype).view(g, m, *x.shape[1:]) for x in (keys, values)]
        rows = q[group.rows].view(g, r, *q.shape[1:])
        window = self._windows[layer]
        if group.causal and (window is None or window >= m):
            out = masked_attention(rows, *gathered, None, causal=True)
        else:
            out = _grouped(rows, *gathered, self._mask(i, group, window))
        return out.reshape(g * r, *q.shape[1:])

    def _mask(self, i: int, group: _Group, window: int | None) -> Tensor | None:
        key = (i, window)
        if key not in self._masks:
            mask = group.visible
            if window is not None and group.distance is not None:
                near = group.distance < window
                mask = near if mask is None else mask & near
            self._masks[key] = mask
        return self._masks[key]


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """``masked_attention`` with mask [g, r, m], the query heads of one kv head as rows: keys are read once."""
    g, r, heads, dim = q.shape
    kv = k.shape[2]
    share = heads // kv
    if share == 1:
        return masked_attention(q, k, v, None if mask is None else mask[:, None])
    q = q.view(g, r, kv, share, dim).permute(0, 2, 3, 1, 4).reshape(g, kv, share * r, dim)
    mask = None if mask is None else mask.repeat(1, share, 1)[:, None]
    out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.view(g, kv, share, r, dim).permute(0, 3, 1, 2, 4).reshape(g, r, heads, dim)


def _run(index: np.ndarray, device: torch.device) -> Tensor | slice:
    """``index`` as a slice where it is a run of consecutive numbers, else as an int64 tensor."""
    if len(index) and index[-1] - index[0] == len(index) - 1 and (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(np.asarray(index, np.int64)).to(device)


def _plain(batch: FlatBatch) -> np.ndarray:
    """Rows that read all keys with the query at their own position."""
    return np.arange(batch.n) if batch.runs is None else np.flatnonzero(np.diff(batch.runs.ptr) == 0)


def _groups(pool: KVPool, batch: FlatBatch, distances: bool) -> list[_Group]:
    """The contexts of the batch, those of like size together."""
    plain = _plain(batch)
    of = batch.context_of[plain]
    order = plain[np.argsort(of, kind="stable")]
    counts = np.bincount(of, minlength=len(batch.context_ptr) - 1)
    starts = np.concatenate([[0], np.cumsum(counts)])
    buckets: dict[tuple[int, int], list[tuple]] = {}
    for q in range(len(counts)):
        if not counts[q]:
            continue
        rows = order[starts[q] : starts[q + 1]]
        context = batch.context[batch.context_ptr[q] : batch.context_ptr[q + 1]]
        item = _one(batch, rows, context)
        size = len(item[1])
        bucket = (len(rows), 0 if pool.region else max(6, size.bit_length()))
        buckets.setdefault(bucket, []).append(item)
    return [_merge(pool, batch, items, distances) for items in buckets.values()]


def _rows_alone(pool: KVPool, batch: FlatBatch, distances: bool) -> list[_Group]:
    """A context for every row; those of the same padded size together."""
    buckets: dict[int, list[tuple]] = {}
    for i in _plain(batch):
        q = batch.context_of[i]
        item = _one(batch, np.array([i]), batch.context[batch.context_ptr[q] : batch.context_ptr[q + 1]])
        buckets.setdefault(-(-len(item[1]) // ALONE_COLUMNS) * ALONE_COLUMNS, []).append(item)
    return [_merge(pool, batch, items, distances, columns=m) for m, items in buckets.items()]


def _one(batch: FlatBatch, rows: np.ndarray, context: np.ndarray) -> tuple:
    """(rows, key slots [m], visible bool [r, m] or None) of one context."""
    if len(rows) == 1:
        i = rows[0]
        seen = batch.local[batch.local_ptr[i] : batch.local_ptr[i + 1]]
        return rows, np.concatenate([context, batch.slots[seen]]), None
    starts, ends = batch.local_ptr[rows], batch.local_ptr[rows + 1]
    lists = [batch.local[a:b] for a, b in zip(starts, ends, strict=True)]
    columns = np.concatenate(lists)
    seen, inverse = np.unique(columns, return_inverse=True)
    visible = np.zeros((len(rows), len(context) + len(seen)), bool)
    visible[:, : len(context)] = True
    visible[np.repeat(np.arange(len(rows)), ends - starts), len(context) + inverse] = True
    keys = np.concatenate([context, batch.slots[seen]])
    return rows, keys, None if visible.all() else visible


def _merge(
    pool: KVPool, batch: FlatBatch, items: list[tuple], distances: bool, *, columns: int | None = None
) -> _Group:
    g, r = len(items), len(items[0][0])
    sizes = [len(keys) for _, keys, _ in items]
    m = columns or max(sizes)
    device = pool.k.device
    rows = np.concatenate([rows for rows, _, _ in items])
    dense = strided([keys for _, keys, _ in items], m, pool.slots) if pool.region else None
    keys = np.zeros((g, m), np.int64)
    padded = min(sizes) < m or columns is not None
    visible = None
    if padded or any(seen is not None for _, _, seen in items):
        visible = np.zeros((g, r, m), bool)
    for i, (_, slots, seen) in enumerate(items):
        keys[i, : len(slots)] = slots
        keys[i, len(slots) :] = slots[-1]
        if visible is not None:
            visible[i, :, : len(slots)] = True if seen is None else seen
    causal = (
        visible is not None
        and g == 1
        and r == m > 1
        and (visible[0] == np.tri(r, dtype=bool)).all()
    )
    distance = None
    if distances:
        at = batch.positions[rows].reshape(g, r, 1) - pool.positions[keys][:, None, :]
        distance = torch.from_numpy(at.astype(np.int32)).to(device)
    return _Group(
        rows=_run(rows, device),
        shape=(g, r, m),
        keys=dense or _run(keys.ravel(), device),
        visible=None if visible is None else torch.from_numpy(visible).to(device),
        causal=bool(causal),
        distance=distance,
    )


@torch.no_grad()
def forward_batch(
    model: Transformer, pool: KVPool, batch: FlatBatch, *, rowwise: bool = False, early: EarlyLogits | None = None
) -> ForwardResult:
    """Run ``batch``: float32 logits of its ``logit_rows``, and the tapped states. ``rowwise``: see PoolContext.
    ``early[l]`` gets the logits of the same rows as layer l would give them, before the layers above it run."""
    device = model.device
    limit = model.rotary.cacheable
    if limit is not None and len(batch.positions) and batch.furthest >= limit:
        raise UnsupportedError(
            f"position {batch.furthest} with rope type {model.config.rope.type!r}: "
            f"its angles change from position {limit} on, so cached keys would be wrong"
        )
    tokens = torch.from_numpy(batch.tokens).to(device)
    positions = torch.from_numpy(np.asarray(batch.positions, np.int64)).to(device)
    embeds = None
    if batch.embeds is not None:
        embeds = model.embed(tokens)
        at = torch.from_numpy(np.asarray(batch.embed_rows, np.int64)).to(device)
        embeds = embeds.index_copy(0, at, batch.embeds.to(embeds))
    tapped: dict[int, Tensor] = {}
    ctx = PoolContext(pool, batch, model.config, rowwise=rowwise)
    if batch.entries:
        check(batch, model.config.num_hidden_layers)

    def logits(hidden: Tensor) -> Tensor:
        wanted = batch.logit_rows
        if len(wanted) < len(hidden) or not np.array_equal(wanted, np.arange(len(hidden))):
            hidden = hidden[torch.from_numpy(np.asarray(wanted, np.int64)).to(device)]
        return model.logits(hidden).float()

    groups = [(rule, torch.from_numpy(np.asarray(rows, np.int64)).to(device)) for rule, rows in batch.sharing]
    with shared_routing(model, groups) if groups else nullcontext():
        hidden = model.hidden(
            None if embeds is not None else tokens, positions, ctx, embeds=embeds, taps=batch.taps, tapped=tapped,
            entries=batch.entries,
            passed={l: lambda x, f=f: f(logits(model.norm(x))) for l, f in (early or {}).items()},
        )  # fmt: skip
    if -1 in batch.taps:
        tapped[-1] = hidden
    return ForwardResult(logits(hidden), tapped)
