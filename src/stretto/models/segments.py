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
class _Piece:
    keys: Tensor  # int64
    columns: slice  # among the keys of its group
    angles: tuple[Tensor, Tensor]  # from where a row was written to its place for the piece, [r, 1, D]
    back: tuple[Tensor, Tensor]


class SegmentContext:
    """``positions`` int64 [n]: where each row was written; ``moved_by`` int64 [n]: how far its key was moved later."""

    def __init__(self, config: ModelConfig, groups: Sequence[Group], positions: Tensor, moved_by: Tensor):
        rotary = Rotary(config.rope, config.head_dim, config.max_position_embeddings)
        self._groups, self._scale = groups, rotary.scale
        self._moved = rotary(moved_by, torch.float32)
        self._pieces = [list(_pieces(g, positions, rotary)) for g in groups]
        self._keys = [torch.cat(list(g.keys)) % len(positions) for g in groups]
        self._hidden = [~g.mask for g in groups]
        order = torch.cat([g.rows for g in groups])
        self._place = torch.empty_like(order)
        self._place[order] = torch.arange(len(order), device=order.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [n, A, D], k and v [n, G, D], rotated at ``positions`` -> [n, A, D]"""
        both = torch.cat([k, turn(k, self._moved, self._scale)])
        outs: Any = _Attention.apply(q * q.shape[-1] ** -0.5, both, v, self)
        return outs


def _pieces(group: Group, positions: Tensor, rotary: Rotary) -> Any:
    at = 0
    for keys, query in zip(group.keys, group.at, strict=True):
        cos, sin = (x / rotary.scale for x in rotary(query - positions[group.rows], torch.float32))
        yield _Piece(keys, slice(at, at + len(keys)), (cos, sin), (cos, -sin))
        at += len(keys)


class _Attention(torch.autograd.Function):
    """All groups of a layer. By hand, since the many small operations of autograd would take twice the time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, c: SegmentContext) -> Tensor:
        """q [n, A, D] with the softmax scale, k [2 n, G, D], v [n, G, D] -> [n, A, D]"""
        out, laws = torch.empty_like(q), []
        for g, pieces, keys, hidden in zip(c._groups, c._pieces, c._keys, c._hidden, strict=True):
            rows, r, kv = q[g.rows], len(g.rows), v.shape[1]
            scores = q.new_empty(kv, q.shape[1] // kv * r, len(keys))
            for p in pieces:
                torch.bmm(
                    _by_head(apply_rope(rows, *p.angles), kv), k[p.keys].permute(1, 2, 0), out=scores[..., p.columns]
                )
            scores.view(kv, -1, *hidden.shape).masked_fill_(hidden, -torch.inf)
            law = torch.softmax(scores, -1)
            laws.append(law)
            out[g.rows] = _by_row(law @ v[keys].transpose(0, 1), r)
        ctx.save_for_backward(q, k, v, *laws)
        ctx.context = c
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, *laws = ctx.saved_tensors
        c, d_out = ctx.context, grads[0]
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for g, pieces, keys, law in zip(c._groups, c._pieces, c._keys, laws, strict=True):
            rows, r, kv = q[g.rows], len(g.rows), v.shape[1]
            d_rows = _by_head(d_out[g.rows], kv)
            dv.index_add_(0, keys, (law.transpose(1, 2) @ d_rows).transpose(0, 1))
            d = (d_rows @ v[keys].permute(1, 2, 0)).mul_(law)
            d.addcmul_(law, d.sum(-1, keepdim=True), value=-1)
            d_q = torch.zeros_like(rows)
            for p in pieces:
                part, there = d[..., p.columns], _by_head(apply_rope(rows, *p.angles), kv)
                d_q += apply_rope(_by_row(part @ k[p.keys].transpose(0, 1), r), *p.back)
                dk.index_add_(0, p.keys, (part.transpose(1, 2) @ there).transpose(0, 1))
            dq[g.rows] = d_q
        return dq, dk, dv, None


def _by_head(x: Tensor, kv: int) -> Tensor:
    """[r, A, D] -> [G, R * r, D]"""
    r, heads, dim = x.shape
    return x.view(r, kv, heads // kv, dim).permute(1, 2, 0, 3).reshape(kv, heads // kv * r, dim)


def _by_row(x: Tensor, r: int) -> Tensor:
    """[G, R * r, D] -> [r, A, D]"""
    kv, _, dim = x.shape
    return x.view(kv, -1, r, dim).permute(2, 0, 1, 3).reshape(r, -1, dim)
