"""Dynamic expert sharing: the rows of one block route within one small set of experts.

A *rule* picks the set C (coreset) from what the router gave all rows of the block; then each row takes its best
experts inside C. Distinct experts cost the reads of their weights, so a forward of few rows costs about |C|. Rules: DES
(arXiv 2602.00879; reconstructed from its abstract, details are not published) and its relative OEA (2511.02237).
Legend: T rows of a block, E experts, K experts a row takes without sharing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stretto.errors import OptionError, UnsupportedError
from stretto.models.config import MoEConfig
from stretto.models.moe import Routed, SparseMLP

__all__ = ["Meter", "SharedByTop", "SharedByVote", "measured", "sharing_rule"]

FRACTION = 0.45  # share of the union that a vote keeps where no budget is given


@dataclass(frozen=True, slots=True)
class SharedByTop:
    """DES-Seq: C = the union of every row's ``keep`` best experts; no row loses them (OEA's two phases, per sequence).

    ``scope``: "sequence" = the rows of one block; "batch" = all blocks of a forward together (OEA): saves more, and a
    result then depends on its batch mates. ``to_full``: scale a row's weights to the sum they have without sharing,
    where the model does not renormalise them itself.
    """

    keep: int
    scope: str = "sequence"
    to_full: bool = False

    def coreset(self, gate: Tensor, choice: Tensor, top_k: int, x: Tensor) -> Tensor:
        """bool [E]; gate and choice [T, E] (moe.scores), x [T, H]."""
        inside = torch.zeros(choice.shape[-1], dtype=torch.bool, device=choice.device)
        inside[choice.topk(self.keep, -1).indices.flatten()] = True
        return inside


@dataclass(frozen=True, slots=True)
class SharedByVote:
    """DES-Vote: every row gives each of its K experts its router weight; C = the experts with the most votes.

    |C| is ``budget``, or the fewest that cover the share ``coverage`` of all votes, or ``fraction`` of the union.
    ``saliency``: "one" counts rows alike, "norm" by the length of their hidden state. ``floor``: add every row's best
    expert. At least K experts stay. ``scope``, ``to_full``: see SharedByTop.
    """

    budget: int | None = None
    coverage: float | None = None
    fraction: float = FRACTION
    saliency: str = "one"
    floor: bool = False
    scope: str = "sequence"
    to_full: bool = False

    def coreset(self, gate: Tensor, choice: Tensor, top_k: int, x: Tensor) -> Tensor:
        """bool [E]; gate and choice [T, E] (moe.scores), x [T, H]."""
        own = choice.topk(top_k, -1).indices
        weight = gate.gather(-1, own)
        if self.saliency == "norm":
            weight = weight * x.float().norm(dim=-1, keepdim=True)
        votes = torch.zeros(choice.shape[-1], dtype=weight.dtype, device=choice.device)
        votes.index_add_(0, own.flatten(), weight.flatten())
        union = torch.zeros_like(votes, dtype=torch.bool)
        union[own.flatten()] = True
        order = votes.masked_fill(~union, -1.0).sort(descending=True, stable=True)
        inside = torch.zeros_like(union)
        inside[order.indices[: self._size(order.values, int(union.sum()), top_k)]] = True
        inside &= union
        if self.floor:
            inside[own[:, 0]] = True
        return inside

    def _size(self, votes: Tensor, union: int, top_k: int) -> int:
        """|C| from the votes in falling order; experts outside the union have -1."""
        if self.budget is not None:
            size = self.budget
        elif self.coverage is not None:
            votes = votes[:union].double()
            before = votes.cumsum(0) - votes
            size = int((before < self.coverage * votes.sum() * (1 - 1e-12)).sum())
        else:
            size = round(self.fraction * union)
        return max(size, top_k)


Rule = SharedByTop | SharedByVote


def sharing_rule(kind: str, moe: MoEConfig | None, budget: int | None = None, scope: str = "sequence") -> Rule | None:
    """The rule of the options ``kind`` ("off", "seq", "vote") and ``budget``: experts a row keeps, or |C|.

    Without a budget: half of a row's experts (rounded up), or FRACTION of the union. Raises UnsupportedError for a
    dense model, OptionError for a budget that the router cannot have.
    """
    if kind == "off":
        return None
    if moe is None:
        raise UnsupportedError("experts cannot be shared: the model is dense; leave moe_sharing at off")
    if kind == "seq":
        keep = -(-moe.top_k // 2) if budget is None else budget
        if not 1 <= keep <= moe.top_k:
            raise OptionError("moe_budget", budget, f"1..{moe.top_k} experts that every row keeps (seq)")
        return SharedByTop(keep, scope)
    if budget is not None and not moe.top_k <= budget <= moe.experts:
        raise OptionError("moe_budget", budget, f"{moe.top_k}..{moe.experts} experts of a block (vote)")
    return SharedByVote(budget, scope=scope)


@dataclass(slots=True)
class Meter:
    """What the routed layers did: one entry a layer and forward in each list."""

    distinct: list[int] = field(default_factory=list)  # experts whose weights were read
    rows: list[int] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)  # share of the vanilla weights' sum that the chosen experts have

    def note(self, routed: Routed) -> None:
        """Count one layer of one forward."""
        self.distinct.append(len(routed.chosen.unique()))
        self.rows.append(len(routed.chosen))
        mine = routed.gate.gather(-1, routed.chosen) * (routed.weights > 0)
        best = routed.gate.gather(-1, routed.choice.topk(routed.chosen.shape[-1], -1).indices)
        self.kept.append(float(mine.sum() / best.sum()))


@contextmanager
def measured(model: nn.Module) -> Iterator[Meter]:
    """Count what the routed layers of ``model`` do meanwhile (torch forward only)."""
    meter = Meter()
    layers = [m for m in model.modules() if isinstance(m, SparseMLP)]
    for layer in layers:
        layer.watch = meter.note
    try:
        yield meter
    finally:
        for layer in layers:
            layer.watch = None
