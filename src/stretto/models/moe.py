"""Routed feed-forward layers: only the chosen experts run, rows grouped by expert.

Legend: n rows, E experts, K chosen a row, H hidden, I expert intermediate size. In memory the
experts of a layer are two tensors, ``gate_up_proj`` (E, 2I, H; gate rows first) and ``down_proj``
(E, H, I); on disk each expert has names of its own (``checkpoint``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stretto.models.config import ModelConfig, MoEConfig
from stretto.models.linear import InferenceLinear

__all__ = [
    "Experts", "Group", "Routed", "Rule", "SparseMLP", "choose_within", "route", "scores", "shared_routing",
]

TINY = 1e-20  # beside a sum of weights that may vanish (sigmoid routers)


def route(logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """logits [n, E] -> weights float32 [n, K], experts int64 [n, K]: softmax over all experts, then
    the top K.
    """
    weights, chosen = F.softmax(logits, -1, dtype=torch.float32).topk(top_k, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen


def scores(logits: Tensor, moe: MoEConfig, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits [n, E] -> (gate, choice) float32 [n, E]: what weighs an expert, and what it is chosen
    by.

    ``choice``: the gate plus ``bias`` [E], -inf in the groups that are not eligible for the row.
    """
    x = logits.float()
    gate = torch.sigmoid(x) if moe.score == "sigmoid" else torch.softmax(x, -1)
    choice = gate if bias is None else gate + bias.float()
    if moe.top_groups < moe.groups:
        grouped = choice.view(len(choice), moe.groups, -1)
        best = grouped.topk(2, -1).values.sum(-1).topk(moe.top_groups, -1).indices
        barred = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
        choice = grouped.masked_fill(barred[..., None], -torch.inf).flatten(1)
    return gate, choice


class Rule(Protocol):
    """Picks the experts that a group of rows may use."""

    @property
    def scope(self) -> str:
        """"sequence", or "batch": the groups of all sequences of a forward are one."""
        ...

    @property
    def to_full(self) -> bool:
        """Scale a row's weights to their sum without the restriction."""
        ...

    def coreset(self, gate: Tensor, choice: Tensor, top_k: int, x: Tensor) -> Tensor:
        """Gate and choice [T, E] (``scores``) and inputs [T, H] of the group -> bool [E]"""
        ...


Group = tuple[Rule, Tensor]  # the rule and the rows (int64 [T]) that route within its set


@dataclass(frozen=True, slots=True)
class Routed:
    """What the router decided for n rows."""

    gate: Tensor  # float32 [n, E]
    choice: Tensor  # float32 [n, E], before any restriction
    weights: Tensor  # float32 [n, K]; 0 where a row found fewer than K experts in its set
    chosen: Tensor  # int64 [n, K]


def choose_within(gate: Tensor, choice: Tensor, moe: MoEConfig, x: Tensor, groups: Sequence[Group]) -> Routed:
    """As ``choose``, with the rows of each group restricted to the set of its rule.

    A row that finds none of its eligible experts there keeps its best one.
    """
    free = choice.clone()
    for rule, rows in groups:
        mine = choice[rows]
        inside = mine.masked_fill(~rule.coreset(gate[rows], mine, moe.top_k, x[rows]), -torch.inf)
        lost = torch.isneginf(inside).all(-1)
        best = torch.zeros_like(inside, dtype=torch.bool).scatter(1, mine.argmax(-1, keepdim=True), True)
        free[rows] = torch.where(lost[:, None] & best, mine, inside)
    top = free.topk(moe.top_k, -1)
    void = torch.isneginf(top.values)
    chosen = torch.where(void, top.indices[:, :1], top.indices)
    weights = gate.gather(-1, chosen).masked_fill(void, 0.0)
    if moe.renormalize and moe.top_k > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    for rule, rows in groups:
        if rule.to_full and not moe.renormalize:
            full = gate[rows].gather(-1, choice[rows].topk(moe.top_k, -1).indices).sum(-1, keepdim=True)
            weights[rows] *= full / (weights[rows].sum(-1, keepdim=True) + TINY)
    return Routed(gate, choice, weights * moe.scale, chosen)


@contextmanager
def shared_routing(model: nn.Module, groups: Sequence[Group]) -> Iterator[None]:
    """The routed layers of ``model`` restrict ``groups`` of rows meanwhile."""
    layers = [m for m in model.modules() if isinstance(m, SparseMLP)]
    for layer in layers:
        layer.groups = groups
    try:
        yield
    finally:
        for layer in layers:
            layer.groups = ()


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
    """The router's matrix (E, H), and perhaps the experts' biases (E)."""

    def __init__(self, experts: int, hidden: int, *, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.expert_bias = nn.Parameter(torch.zeros(experts)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class SparseMLP(nn.Module):
    """Router and experts, and what every row passes (``shared``). ``router_logits`` of the last call
    stay readable when ``record`` is set (for losses).
    """

    def __init__(self, c: ModelConfig, shared: nn.Module | None = None):
        super().__init__()
        moe = c.moe
        self.facts = moe
        self.top_k, self.renormalize, self.cast = moe.top_k, moe.renormalize, moe.cast
        self.plain = moe == replace(moe, score="softmax", expert_bias=False, groups=1, scale=1.0)
        self.gate = _Gate(moe.experts, c.hidden_size, bias=moe.expert_bias)
        self.experts = Experts(moe.experts, c.hidden_size, moe.intermediate_size)
        self.shared_experts = shared
        self.groups: Sequence[Group] = ()  # set by shared_routing
        self.watch: Callable[[Routed], None] | None = None  # sees every decision of the router
        self.record = False
        self.router_logits: Tensor | None = None
        self.packed_gate: InferenceLinear | None = None

    def pack(self) -> None:
        """Reorder router and experts for inference."""
        wide = self.facts.score == "sigmoid"
        self.packed_gate = InferenceLinear([self.gate.weight.float() if wide else self.gate.weight])
        if self.shared_experts is not None:
            self.shared_experts.pack()
        self.experts.pack()

    def forward(self, x: Tensor) -> Tensor:
        """x [n, H] -> [n, H]"""
        logits = self._logits(x)
        if self.record:
            self.router_logits = logits
        if self.plain and not self.groups and self.watch is None:
            weights, chosen = route(logits, self.top_k, renormalize=self.renormalize)
        else:
            gate, choice = scores(logits, self.facts, self.gate.expert_bias)
            routed = choose_within(gate, choice, self.facts, x, self.groups)
            weights, chosen = routed.weights, routed.chosen
            if self.watch is not None:
                self.watch(routed)
        out = self.experts(x, weights.to(x.dtype) if self.cast else weights, chosen)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def _logits(self, x: Tensor) -> Tensor:
        """[n, E]; sigmoid routers work in float32."""
        x = x.float() if self.facts.score == "sigmoid" else x
        if self.packed_gate is not None:
            return self.packed_gate(x)
        return F.linear(x, self.gate.weight.to(x.dtype))
