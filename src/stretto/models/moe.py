"""Routed feed-forward layers: only the chosen experts run, rows grouped by expert.

Legend: n rows, E experts, K chosen a row, H hidden, I expert intermediate size. In memory the
experts of a layer are two tensors, ``gate_up_proj`` (E, 2I, H; gate rows first) and ``down_proj``
(E, H, I); on disk each expert has names of its own (``checkpoint``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stretto.models.config import ModelConfig
from stretto.models.linear import InferenceLinear

__all__ = ["Experts", "SparseMLP", "route"]


def route(logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """logits [n, E] -> weights float32 [n, K], experts int64 [n, K]: softmax over all experts, then
    the top K.
    """
    weights, chosen = F.softmax(logits, -1, dtype=torch.float32).topk(top_k, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen


class Experts(nn.Module):
    """The fused weights of the experts of one layer."""

    def __init__(self, experts: int, hidden: int, intermediate: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))
        self.experts = experts
        self.packed: list[tuple[InferenceLinear, InferenceLinear]] | None = None

    def pack(self) -> None:
        """Reorder the weights for inference; the plain ones go."""
        pairs = zip(self.gate_up_proj, self.down_proj, strict=True)
        self.packed = [(InferenceLinear([a]), InferenceLinear([b])) for a, b in pairs]
        del self.gate_up_proj, self.down_proj

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [n, H], weights and chosen [n, K] -> the weighted sum of the experts' outputs [n,
        H].
        """
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        rows = order // chosen.shape[1]
        scale = weights.reshape(-1)[order, None]
        counts = torch.bincount(flat, minlength=self.experts).tolist()
        out = torch.zeros_like(x)
        start = 0
        for expert, count in enumerate(counts):
            if not count:
                continue
            part = rows[start : start + count]
            y = self._expert(expert, x[part]) * scale[start : start + count]
            out = out.index_add(0, part, y.to(x.dtype))
            start += count
        return out

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        if self.packed is not None:
            gate_up, down = self.packed[expert]
            gate, up = gate_up(x).chunk(2, -1)
            return down(F.silu(gate) * up)
        gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down_proj[expert])


class _Gate(nn.Module):
    """The router's matrix (E, H)."""

    def __init__(self, experts: int, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class SparseMLP(nn.Module):
    """Router and experts. ``router_logits`` of the last call stay readable when ``record`` is set
    (for losses).
    """

    def __init__(self, c: ModelConfig):
        super().__init__()
        moe = c.moe
        self.top_k, self.renormalize, self.cast = moe.top_k, moe.renormalize, moe.cast
        self.gate = _Gate(moe.experts, c.hidden_size)
        self.experts = Experts(moe.experts, c.hidden_size, moe.intermediate_size)
        self.record = False
        self.router_logits: Tensor | None = None
        self.packed_gate: InferenceLinear | None = None

    def pack(self) -> None:
        """Reorder router and experts for inference."""
        self.packed_gate = InferenceLinear([self.gate.weight])
        self.experts.pack()

    def forward(self, x: Tensor) -> Tensor:
        """x [n, H] -> [n, H]"""
        logits = self.gate(x) if self.packed_gate is None else self.packed_gate(x)
        if self.record:
            self.router_logits = logits
        weights, chosen = route(logits, self.top_k, renormalize=self.renormalize)
        return self.experts(x, weights.to(x.dtype) if self.cast else weights, chosen)
