"""Attention contexts: who sees whom, and where keys and values live.

Legend: n rows, A heads, G kv heads (R = A/G query heads share one), D head_dim, L layers, S slots.
Masks are bool, True = visible. ``attend`` gets q and k already rotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.errors import OptionError, PromptError, UnsupportedError
from stretto.models.batch import EarlyLogits, FlatBatch, ForwardResult, KVPool
from stretto.models.entries import check
from stretto.models.moe import shared_routing
from stretto.models.strided import Strided, strided

if TYPE_CHECKING:
    from stretto.models.config import ModelConfig
    from stretto.models.transformer import Transformer

__all__ = ["AttentionContext", "PackedContext", "PoolContext", "forward_batch", "packed", "plain_logits"]

ALONE_COLUMNS = 512  # float32 attention on CPUs works in column blocks of this size

Kind = str | tuple[str, int] | Tensor


class AttentionContext(Protocol):
    """What a layer asks for its attention."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [n, A, D], k and v [n, G, D], rotated -> [n, A, D]"""
        ...


class PackedContext:
    """Segments of ``lengths`` rows side by side, without a cache: training and scoring.

    ``kind``: "causal", "full", ("block", B) = causal over blocks of B rows and full inside one, or
    a bool mask: [t, t] for each of the segments (all of length t), [b, t, t] one for each, or [n,
    n] over all rows. ``windows``: sliding window per layer in rows (None = unlimited); the rows of
    a segment are then consecutive positions.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        kind: Kind = "causal",
        *,
        windows: Sequence[int | None] = (),
        device: str | torch.device = "cpu",
    ):
        self.lengths = [int(t) for t in lengths]
        if not self.lengths or min(self.lengths) < 1:
            raise PromptError(f"segment lengths {self.lengths} must all be at least 1")
        self._kind, self._windows, self._device = kind, windows, torch.device(device)
        self._masks: dict[int | None, Tensor | None] = {}
        if isinstance(kind, Tensor):
            self._check_mask(kind)
        elif kind not in ("causal", "full") and not _is_block(kind):
            raise OptionError("kind", kind, "causal, full, ('block', B >= 1) or a bool mask")
        self._whole = isinstance(kind, Tensor) and len(set(self.lengths) | {kind.shape[-1]}) > 1
        self._equal = len(set(self.lengths)) == 1 and not self._whole
        self._pad = None if self._equal or self._whole else _Padding(self.lengths, self._device)

    def _check_mask(self, mask: Tensor) -> None:
        n, lengths = mask.shape[-1], set(self.lengths)
        fits = lengths == {n} or (mask.dim() == 2 and n == sum(self.lengths))
        fits &= mask.dim() == 2 or len(mask) == len(self.lengths)
        if mask.dim() not in (2, 3) or mask.shape[-2] != n or not fits or mask.dtype != torch.bool:
            raise OptionError(
                "kind", f"mask {tuple(mask.shape)} of {mask.dtype}", "bool, square, of the lengths"
            )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self._windows[layer] if self._windows else None
        if self._whole:
            return _sdpa(q[None], k[None], v[None], self._mask(window, len(q)))[0]
        if self._pad is not None:
            q, k, v = self._pad.spread(q), self._pad.spread(k), self._pad.spread(v)
            return self._pad.collect(self._sdpa(q, k, v, window))
        b, t = len(self.lengths), self.lengths[0]
        out = self._sdpa(*(x.view(b, t, *x.shape[1:]) for x in (q, k, v)), window)
        return out.reshape(q.shape)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """[b, t, heads, D] of each -> [b, t, A, D]"""
        t = q.shape[1]
        if self._kind == "causal" and (window is None or window >= t):
            return _sdpa(q, k, v, None, causal=True)  # padding stands right, so nobody real sees it
        return _sdpa(q, k, v, self._mask(window, t))

    def _mask(self, window: int | None, t: int) -> Tensor | None:
        if window not in self._masks:
            self._masks[window] = self._build(window, t)
        return self._masks[window]

    def _build(self, window: int | None, t: int) -> Tensor | None:
        at = torch.arange(t, device=self._device)
        i, j = at[:, None], at[None, :]
        if isinstance(self._kind, Tensor):
            mask = self._kind.to(self._device)
            mask = mask[:, None] if mask.dim() == 3 else mask
        elif self._kind == "causal":
            mask = j <= i
        elif self._kind == "full":
            mask = None
        else:
            block = self._kind[1]
            mask = j // block <= i // block
        if window is not None and window < t:
            near = (i - j) < window
            mask = near if mask is None else mask & near
        if self._pad is not None and self._kind != "causal":
            real = self._pad.real[:, None, None, :]
            mask = real if mask is None else mask & real
        return mask


def _is_block(kind: object) -> bool:
    return isinstance(kind, tuple) and len(kind) == 2 and kind[0] == "block" and kind[1] >= 1


class _Padding:
    """Rows of unequal segments <-> [b, T, ...], padded on the right."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.shape = (len(lengths), max(lengths))
        lens = torch.tensor(lengths, device=device)
        self.real = torch.arange(self.shape[1], device=device) < lens[:, None]  # [b, T]
        self._index = self.real.flatten().nonzero()[:, 0]

    def spread(self, x: Tensor) -> Tensor:
        out = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return out.index_copy(0, self._index, x).view(*self.shape, *x.shape[1:])

    def collect(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *x.shape[2:]).index_select(0, self._index)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool = False) -> Tensor:
    """[b, t, A, D], [b, m, G, D] twice, mask broadcastable to [b, A, t, m] -> [b, t, A, D]"""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


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
        self._groups = _rows_alone(pool, batch, self._distances) if rowwise else _groups(pool, batch, self._distances)
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.pool.k[layer], self.pool.v[layer]
        keys[self._slots] = k.to(keys.dtype)
        values[self._slots] = v.to(values.dtype)
        out = None if self._alone else torch.empty_like(q)
        for i, group in enumerate(self._groups):
            part = self._attend(i, group, layer, q, keys, values)
            if out is None:
                return part
            out[group.rows] = part
        return out

    @property
    def _alone(self) -> bool:
        return len(self._groups) == 1 and isinstance(
            self._groups[0].rows, slice
        )  # then it is all rows

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
            out = _sdpa(rows, *gathered, None, causal=True)
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
    """As ``_sdpa`` with mask [g, r, m], but the query heads of one kv head stand as rows: keys are read once."""
    g, r, heads, dim = q.shape
    kv = k.shape[2]
    share = heads // kv
    if share == 1:
        return _sdpa(q, k, v, None if mask is None else mask[:, None])
    q = q.view(g, r, kv, share, dim).permute(0, 2, 3, 1, 4).reshape(g, kv, share * r, dim)
    mask = None if mask is None else mask.repeat(1, share, 1)[:, None]
    out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.view(g, kv, share, r, dim).permute(0, 3, 1, 2, 4).reshape(g, r, heads, dim)


def _run(index: np.ndarray, device: torch.device) -> Tensor | slice:
    """``index`` as a slice where it is a run of consecutive numbers, else as an int64 tensor."""
    if len(index) and index[-1] - index[0] == len(index) - 1 and (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(np.asarray(index, np.int64)).to(device)


def _groups(pool: KVPool, batch: FlatBatch, distances: bool) -> list[_Group]:
    """The contexts of the batch, those of like size together."""
    order = np.argsort(batch.context_of, kind="stable")
    counts = np.bincount(batch.context_of, minlength=len(batch.context_ptr) - 1)
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
    for i in range(batch.n):
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
    if limit is not None and len(batch.positions) and batch.positions.max() >= limit:
        raise UnsupportedError(
            f"position {batch.positions.max()} with rope type {model.config.rope.type!r}: "
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


def packed(
    config: ModelConfig, lengths: Sequence[int], *, device: str | torch.device = "cpu"
) -> PackedContext:
    """The context in which the model was trained: its own attention kind and windows."""
    kind: Kind = ("block", config.block_size) if config.attention == "block" else config.attention
    windows = config.windows if any(w is not None for w in config.windows) else ()
    return PackedContext(lengths, kind, windows=windows, device=device)


@torch.no_grad()
def plain_logits(model: Transformer, ids: Sequence[int]) -> Tensor:
    """float32 [n, V] of one text, without cache or batch: the reference that every faster path must equal."""
    if not len(ids):
        raise PromptError("the prompt is empty: give at least one token")
    tokens = torch.as_tensor(ids, dtype=torch.int64, device=model.device)
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.config.vocab_size:
        raise PromptError(f"token ids must lie in 0..{model.config.vocab_size - 1}")
    ctx = packed(model.config, [len(tokens)], device=model.device)
    return model(tokens, torch.arange(len(tokens), device=model.device), ctx).float()
