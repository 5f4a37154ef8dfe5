"""Attention of rows that read their keys in runs (``batch.Runs``), each run with the query turned to its own position.

With rotary positions, a query at p and key i of a segment that begins at o have the score (R(p) q)'(R(o + i) k) =
(R(p - o) q)'(R(i) k): keys stay at the positions of their own segment, and where a segment begins for a reader
is a rotation of the reader's query. The rotation is pure: a rope type that scales cos and sin does so once, at p.

Legend: r rows, m keys of the longest list, t runs, A heads, G kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from stretto.errors import UnsupportedError
from stretto.models.batch import FlatBatch
from stretto.models.config import ModelConfig
from stretto.models.rope import Rotary, apply_rope

__all__ = ["TurnedRows", "turn", "turned_rows"]

ELEMENTS = 1 << 22  # of [r, m, A, D] at a time


def turn(x: Tensor, angles: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """x [n, heads, D] turned by ``angles`` (cos and sin, [n, 1, R], of a Rotary with this scale): a pure rotation."""
    return apply_rope(x, angles[0] / scale, angles[1] / scale)


class TurnedRows:
    """Some rows of a batch that read in runs; index tensors are built once, not per layer."""

    def __init__(self, batch: FlatBatch, rows: np.ndarray, config: ModelConfig, device: torch.device):
        runs = batch.runs
        assert runs is not None
        lists = [_keys(batch, i) for i in rows]
        m = max(map(len, lists))
        slots, run_of = np.zeros((len(rows), m), np.int64), np.zeros((len(rows), m), np.int64)
        visible = np.zeros((len(rows), m), bool)
        owners, by = [], []
        for r, (i, keys) in enumerate(zip(rows, lists, strict=True)):
            a, b, n = runs.ptr[i], runs.ptr[i + 1], len(keys)
            slots[r, :n], visible[r, :n] = keys, True
            run_of[r, :n] = np.searchsorted(runs.start[a:b], np.arange(n), "right") - 1 + len(owners)
            owners += [int(i)] * int(b - a)
            by += (runs.at[a:b] - batch.positions[i]).tolist()
        index = lambda x: torch.from_numpy(np.asarray(x, np.int64)).to(device)
        self.rows, self._slots, self._run_of, self._owners = index(rows), index(slots), index(run_of), index(owners)
        self._visible = torch.from_numpy(visible).to(device)
        rotary = Rotary(config.rope, config.head_dim, config.max_position_embeddings)
        self._angles, self._scale = rotary(index(by), torch.float32), rotary.scale

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q [n, A, D] of the whole batch, rotated; keys and values [S, G, D] of the pool -> [r, A, D]"""
        dtype = torch.promote_types(q.dtype, torch.float32)
        k, v = (x[self._slots].to(dtype) for x in (keys, values))  # [r, m, G, D]
        turned = turn(q[self._owners].to(dtype), self._angles, self._scale)  # [t, A, D]
        q_rmAD = turned[self._run_of]
        grouped = q_rmAD.view(*q_rmAD.shape[:2], k.shape[2], -1, k.shape[3])
        scores = (grouped * k[:, :, :, None]).sum(-1) * k.shape[-1] ** -0.5  # [r, m, G, A / G]
        law = scores.masked_fill(~self._visible[:, :, None, None], -torch.inf).softmax(1)
        return (law[..., None] * v[:, :, :, None]).sum(1).flatten(1, 2).to(q.dtype)


def turned_rows(
    batch: FlatBatch, config: ModelConfig, device: torch.device, *, alone: bool
) -> Iterator[TurnedRows]:
    """The rows of ``batch`` that read in runs, in portions; ``alone``: each row in one of its own."""
    if batch.runs is None:
        return
    if any(config.windows):
        raise UnsupportedError("rows that read segments at positions of their own need a model without windows")
    rows = np.flatnonzero(np.diff(batch.runs.ptr))
    most = max((len(_keys(batch, i)) for i in rows), default=1)
    size = 1 if alone else max(1, ELEMENTS // (most * config.num_attention_heads * config.head_dim))
    for at in range(0, len(rows), size):
        yield TurnedRows(batch, rows[at : at + size], config, device)


def _keys(batch: FlatBatch, i: int) -> np.ndarray:
    """Slots of the keys that row i sees, in order."""
    q = batch.context_of[i]
    seen = batch.local[batch.local_ptr[i] : batch.local_ptr[i + 1]]
    return np.concatenate([batch.context[batch.context_ptr[q] : batch.context_ptr[q + 1]], batch.slots[seen]])
