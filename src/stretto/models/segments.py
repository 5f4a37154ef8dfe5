"""Attention of a whole trace of lines that were read while they were written: training, and scoring without a cache.

Every row is evaluated once, as when it was written. Its key has up to two places: in the line in which it was
written, and in the line to which it was moved later. A *group* is the rows of one reader; it reads *pieces*: sets of
keys with one query position a row for all of a piece (``turned.py`` says why that is enough). Equals what the engine
computes step by step from ``batch.Runs``.

Legend: n rows, r rows and m keys of a group, A heads, G kv heads (R = A/G query heads share one), D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stretto.models.config import ModelConfig
from stretto.models.rope import Rotary, apply_rope
from stretto.models.turned import turn

__all__ = ["Group", "SegmentContext"]


@dataclass(frozen=True, slots=True)
class Group:
    """``keys``: for each piece the numbers of its keys, in the order of ``mask``'s columns: j is row j where it was
    written, n + j the same row where it was moved to."""

    rows: Tensor  # int64 [r]
    keys: Sequence[Tensor]  # of int64 [m of the piece]
    at: Sequence[Tensor]  # of int64 [r]: position of each row's query for the piece
    mask: Tensor  # bool [r, m]: row sees key


@dataclass(frozen=True, slots=True)
class _Plan:
    """Of a group: p pieces, m keys."""

    rows: Tensor  # int64 [r]
    keys: Tensor  # int64 [m] numbers of the keys
    values: Tensor  # int64 [m] rows of their values
    columns: list[slice]  # of each piece
    hidden: Tensor  # bool [r, m]
    there: tuple[Tensor, Tensor]  # angles from where a row was written to its place for each piece, [p r, 1, D]
    back: tuple[Tensor, Tensor]


class SegmentContext:
    """``positions`` int64 [n]: where each row was written; ``moved_by`` int64 [n]: how far its key was moved later."""

    def __init__(self, config: ModelConfig, groups: Sequence[Group], positions: Tensor, moved_by: Tensor):
        rotary = Rotary(config.rope, config.head_dim, config.max_position_embeddings)
        self._scale = rotary.scale
        self._moved = rotary(moved_by, torch.float32)
        self._plans = [_plan(g, positions, rotary) for g in groups]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [n, A, D], k and v [n, G, D], rotated at ``positions`` -> [n, A, D]"""
        both = torch.cat([k, turn(k, self._moved, self._scale)])
        outs: Any = _Attention.apply(q * q.shape[-1] ** -0.5, both, v, self._plans)
        return outs


def _plan(group: Group, positions: Tensor, rotary: Rotary) -> _Plan:
    keys = torch.cat(list(group.keys))
    ends = [sum(len(k) for k in group.keys[: i + 1]) for i in range(len(group.keys))]
    columns = [slice(end - len(k), end) for end, k in zip(ends, group.keys, strict=True)]
    by = torch.cat([at - positions[group.rows] for at in group.at])
    cos, sin = (x / rotary.scale for x in rotary(by, torch.float32))
    return _Plan(group.rows, keys, keys % len(positions), columns, ~group.mask, (cos, sin), (cos, -sin))


class _Attention(torch.autograd.Function):
    """All groups of a layer. By hand, since the many small operations of autograd would take several times as long."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plans: Sequence[_Plan]) -> Tensor:
        """q [n, A, D] with the softmax scale, k [2 n, G, D], v [n, G, D] -> [n, A, D]"""
        out, kept, kv = torch.empty_like(q), [], v.shape[1]
        for p in plans:
            turned = _by_head(apply_rope(q[p.rows].repeat(len(p.columns), 1, 1), *p.there), kv, len(p.columns))
            keys = k[p.keys].permute(1, 2, 0)
            law = q.new_empty(kv, turned.shape[2], len(p.keys))
            for i, columns in enumerate(p.columns):
                torch.bmm(turned[i], keys[..., columns], out=law[..., columns])
            law.view(kv, -1, *p.hidden.shape).masked_fill_(p.hidden, -torch.inf)
            law = torch.softmax(law, -1)
            out[p.rows] = _by_row((law @ v[p.values].transpose(0, 1))[None], len(p.rows))
            kept += [turned, law]
        ctx.save_for_backward(q, k, v, *kept)
        ctx.plans = plans
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        kv, d_out = v.shape[1], grads[0]
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for p, turned, law in zip(ctx.plans, kept[::2], kept[1::2], strict=True):
            d_rows = _by_head(d_out[p.rows], kv, 1)[0]
            dv.index_add_(0, p.values, (law.transpose(1, 2) @ d_rows).transpose(0, 1))
            d = (d_rows @ v[p.values].permute(1, 2, 0)).mul_(law)
            d.addcmul_(law, d.sum(-1, keepdim=True), value=-1)
            keys, d_turned = k[p.keys].transpose(0, 1), torch.empty_like(turned)
            d_keys = torch.empty_like(keys)
            for i, columns in enumerate(p.columns):
                torch.bmm(d[..., columns], keys[:, columns], out=d_turned[i])
                d_keys[:, columns] = d[..., columns].transpose(1, 2) @ turned[i]
            dk.index_add_(0, p.keys, d_keys.transpose(0, 1))
            back = apply_rope(_by_row(d_turned, len(p.rows)), *p.back)
            dq[p.rows] = back.view(len(p.columns), len(p.rows), *back.shape[1:]).sum(0)
        return dq, dk, dv, None


def _by_head(x: Tensor, kv: int, pieces: int) -> Tensor:
    """[p r, A, D] -> [p, G, R r, D]"""
    n, heads, dim = x.shape
    r = n // pieces
    return x.view(pieces, r, kv, heads // kv, dim).permute(0, 2, 3, 1, 4).reshape(pieces, kv, heads // kv * r, dim)


def _by_row(x: Tensor, r: int) -> Tensor:
    """[p, G, R r, D] -> [p r, A, D]"""
    p, kv, _, dim = x.shape
    return x.view(p, kv, -1, r, dim).permute(0, 3, 1, 2, 4).reshape(p * r, -1, dim)
