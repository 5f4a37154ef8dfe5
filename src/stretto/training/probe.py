"""A quick look at accuracy while training: exact matches on test examples, without the engine.

A development aid; the measure that is reported comes from ``stretto eval``. Legend of shapes: b rows, t places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stretto.training.data import PackedBatch
from stretto.training.objectives import Net, causal_mask, full_mask

__all__ = ["block_causal_mask", "match_autoregressive", "match_diffusion", "per_document", "probe"]

Matcher = Callable[[PackedBatch], list[bool]]


def block_causal_mask(batch: PackedBatch, block: int) -> Tensor:
    """Every place sees the blocks of its example up to its own: bool [b, t, t]."""
    blocks = batch.positions // block
    return full_mask(batch) & (blocks[:, None, :] <= blocks[:, :, None])


@torch.no_grad()
def match_autoregressive(net: Net, batch: PackedBatch) -> list[bool]:
    """Whether greedy decoding gives each answer: all arg-maxima along the answer agree with it, in one forward."""
    best = net.logits(net.hidden(batch.tokens, batch.positions, causal_mask(batch))).argmax(-1)
    right = torch.ones_like(batch.answer)
    right[:, 1:] = (best[:, :-1] == batch.tokens[:, 1:]) | ~batch.answer[:, 1:]
    return per_document(right, batch)


@torch.no_grad()
def match_diffusion(
    net: Net, batch: PackedBatch, *, mask_id: int, block: int, block_causal: bool, eos_id: int,
) -> list[bool]:
    """Whether unmasking one token a forward, the most certain of the leftmost unfinished block, gives each answer.

    Every example of a row decodes at the same time. An answer is compared up to its first end-of-text.
    """
    tokens = batch.tokens.masked_fill(batch.answer, mask_id)
    mask = block_causal_mask(batch, block) if block_causal else full_mask(batch)
    group = torch.arange(len(tokens))[:, None] * tokens.shape[1] + batch.docs.clamp(min=0)
    count = tokens.numel() + tokens.shape[1]
    while (masked := (tokens == mask_id) & batch.answer).any():
        logits = net.logits(net.hidden(tokens, batch.positions, mask)[masked]).float()
        logits[:, mask_id] = -torch.inf
        sure_m, best_m = logits.softmax(-1).max(-1)
        group_m, block_m = group[masked], batch.positions[masked] // block
        first = torch.full((count,), 1 << 30).scatter_reduce(0, group_m, block_m, "amin")
        sure_m = sure_m.masked_fill(block_m > first[group_m], -1.0)
        top = torch.full((count,), -1.0).scatter_reduce(0, group_m, sure_m, "amax")
        chosen = masked.clone()
        chosen[masked] = sure_m >= top[group_m]
        tokens[chosen] = best_m[chosen[masked]]
    return per_document(_until_end(tokens, batch, eos_id), batch)


def _until_end(tokens: Tensor, batch: PackedBatch, eos_id: int) -> Tensor:
    """Right places; those behind the reference's first end-of-text do not count."""
    ends = ((batch.tokens == eos_id) & batch.answer).long()
    before = ends.cumsum(1) - ends
    opening = batch.positions == 0
    start = torch.where(opening, before, -1).cummax(1).values
    return (tokens == batch.tokens) | ~batch.answer | (before > start)


def per_document(right: Tensor, batch: PackedBatch) -> list[bool]:
    """Whether every place of an example is right, example after example."""
    return [
        bool(right[r][batch.docs[r] == k].all())
        for r in range(len(right)) for k in range(int(batch.docs[r].max()) + 1)
    ]


def probe(match: Matcher, batches: Mapping[str, PackedBatch]) -> dict[str, float]:
    """Share of exact answers per task."""
    out = {}
    for task, batch in batches.items():
        right = match(batch)
        out[task] = sum(right) / len(right)
    return out
