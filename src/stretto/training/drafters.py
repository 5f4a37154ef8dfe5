"""The objectives of drafters: Medusa heads, Clover's chain, EAGLE's layer.

All are teacher-forced: at a place n of a text, head or depth i foresees token n + 2 + i (the token n + 1 is the model's
own). Legend of shapes: b rows, t places, k places that count, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.models.heads import MedusaHeads
from stretto.training.data import PackedBatch
from stretto.training.objectives import Loss
from stretto.training.parts import FrozenNet, acceptance, ahead

__all__ = ["Medusa", "ranks_of"]


def ranks_of(logits_kV: Tensor, tokens_k: Tensor) -> Tensor:
    """int64 [k]: how many tokens have larger logits than the right one."""
    right = logits_kV.gather(1, tokens_k[:, None])
    return (logits_kV > right).sum(1)


class Medusa:
    """Cross-entropy of every head, weighed by 0.8^i (Medusa-1: the model is frozen)."""

    DECAY = 0.8

    def __init__(self, net: FrozenNet, *, heads: int = 4):
        self._net, self.heads = net, heads
        self.module = MedusaHeads(net.model.config.hidden_size, heads)
        self.config: dict[str, Any] = {"heads": heads}

    def __call__(self, net: Any, batch: PackedBatch, generator: torch.Generator) -> Loss:
        x = self._net.features(batch)[-1]
        targets = [ahead(batch, 2 + i) for i in range(self.heads)]
        used = targets[0][1]
        h = self.module(x[used])
        total, labels = torch.zeros(()), 0
        for i, (tokens, valid) in enumerate(targets):
            at = valid[used]
            logits = F.linear(h[at, i], self._net.head)
            total = total + self.DECAY**i * F.cross_entropy(logits.float(), tokens[used][at])
            labels += int(at.sum())
        return Loss(total, labels)

    @torch.no_grad()
    def statistics(self, batches: Sequence[PackedBatch]) -> dict[str, Any]:
        ranks: list[list[Tensor]] = [[] for _ in range(self.heads)]
        for batch in batches:
            used = ahead(batch, 2)[1]
            h = self.module(self._net.features(batch)[-1][used])
            for i in range(self.heads):
                tokens, valid = ahead(batch, 2 + i)
                rank = ranks_of(F.linear(h[:, i], self._net.head), tokens[used])
                ranks[i].append(torch.where(valid[used], rank, -1))
        return {"acceptance": acceptance([torch.cat(r) for r in ranks])}
