"""Causal mask recovery (WeDLM, arXiv 2512.22737): masked diffusion learnt under plain causal attention.

Two streams of the same text, each place with its own position: the *memory* stream is the clean text, causal; the
*prediction* stream holds the blocks with answer tokens, some of them masked, and in every block the observed tokens
stand physically before the masked ones. Rows are causal in physical order, so a mask sees every observed token of its
block, the masks before it, and the clean blocks before its own. Legend of shapes: b rows, t places, q places of the
prediction stream, k labels. Masks: ``mask[.., i, j]`` is true where place i sees place j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.training.data import PackedBatch
from stretto.training.noise import last_first, stratified
from stretto.training.objectives import Loss, Net, causal_mask, two_stream
from stretto.training.probe import per_document

__all__ = ["CausalRecovery", "Prediction", "match_recovery", "recovery_mask", "reorder"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction stream, in physical order; ``place`` = -1 is padding."""

    place: Tensor  # int64 [b, q] the place in the batch
    docs: Tensor  # int64 [b, q], -2 = padding
    positions: Tensor  # int64 [b, q]
    clean: Tensor  # int64 [b, q] the tokens
    hidden: Tensor  # bool [b, q] masked
    weight: Tensor  # float32 [b, q] 1 / share of the block's candidates that is masked; 0 where not masked


@dataclass(frozen=True, slots=True)
class CausalRecovery:
    """Masked rows predict the token of their own position, weighted by 1/gamma; memory rows the next token.

    gamma ~ U(0, 1) a block, round(gamma * candidates) answer tokens of it are masked. Both losses are weighted
    means; ``ar_weight`` is the weight of the second (paper: 1), which keeps the model autoregressive too.
    ``end_id``: behind it an answer is filling, which masked rows learn and memory rows do not. ``suffix``: share of
    the blocks whose masks are its last candidates instead of random ones (0 in the paper): the states that decoding
    visits most, and of which random masks of a block of 16 show one in fourteen.
    """

    mask_id: int
    block: int
    ar_weight: float = 1.0
    end_id: int | None = None
    suffix: float = 0.0

    def __call__(self, net: Net, batch: PackedBatch, generator: torch.Generator) -> Loss:
        p = reorder(batch, self.block, generator, self.suffix)
        q = p.place.shape[1]
        states = net.hidden(
            torch.cat([p.clean.masked_fill(p.hidden, self.mask_id), batch.tokens], 1),
            torch.cat([p.positions, batch.positions], 1),
            recovery_mask(p, batch, self.block),
        )
        follows_bt = (batch.docs[:, 1:] == batch.docs[:, :-1]) & batch.answer[:, 1:]
        if self.end_id is not None:
            follows_bt &= ~(batch.answer[:, :-1] & (batch.tokens[:, :-1] == self.end_id))
        rows = torch.cat([states[:, :q][p.hidden], states[:, q:-1][follows_bt]])
        targets_k = torch.cat([p.clean[p.hidden], batch.tokens[:, 1:][follows_bt]])
        loss_k = F.cross_entropy(net.logits(rows), targets_k, reduction="none")
        masked = int(p.hidden.sum())
        weight_m = p.weight[p.hidden]
        recovery = (loss_k[:masked] * weight_m).sum() / weight_m.sum().clamp(min=1e-8)
        return Loss(recovery + self.ar_weight * loss_k[masked:].mean(), len(targets_k))


def reorder(batch: PackedBatch, block: int, generator: torch.Generator, suffix: float = 0.0) -> Prediction:
    """Draw the masks of every block with answer tokens, and put observed tokens before masked ones. ``suffix``: see
    :class:`CausalRecovery`."""
    place_bq = two_stream(batch, block)
    real_bq, at_bq = place_bq >= 0, place_bq.clamp(min=0)
    docs_bq = batch.docs.gather(1, at_bq).masked_fill(~real_bq, -2)
    positions_bq = batch.positions.gather(1, at_bq)
    maskable_bq = batch.answer.gather(1, at_bq) & real_bq
    b, t = batch.tokens.shape
    row_bq = torch.arange(b, device=place_bq.device)[:, None].expand_as(place_bq)
    group_bq = (row_bq * t + docs_bq) * t + positions_bq // block
    hidden_bq, weight_bq = torch.zeros_like(maskable_bq), torch.zeros(maskable_bq.shape, device=place_bq.device)
    chosen_m, weight_m = (x.to(place_bq.device) for x in _choose(group_bq[maskable_bq].cpu(), generator, suffix))
    hidden_bq[maskable_bq] = chosen_m
    weight_bq[maskable_bq] = weight_m
    last = torch.iinfo(torch.int64).max
    order_bq = (2 * group_bq + hidden_bq).masked_fill(~real_bq, last).sort(dim=1, stable=True).indices
    put = lambda x: x.gather(1, order_bq)
    return Prediction(
        put(place_bq), put(docs_bq), put(positions_bq), put(batch.tokens.gather(1, at_bq)), put(hidden_bq),
        put(weight_bq),
    )


def _choose(group_m: Tensor, generator: torch.Generator, suffix: float) -> tuple[Tensor, Tensor]:
    """bool [m] masked and float32 [m] its weight, one gamma per group; the numbers of a group are stratified.

    Masked are random places of a group, or in a share ``suffix`` of the groups its last ones; ``group_m`` has the
    places of a group in ascending order.
    """
    _, inverse_m, counts_g = torch.unique(group_m, return_inverse=True, return_counts=True)
    amount_g = (stratified(len(counts_g), generator) * counts_g).round().long()
    u_m = torch.rand(len(group_m), generator=generator, dtype=torch.float64)
    u_m = last_first(u_m, inverse_m, suffix, generator)
    order_m = torch.argsort(inverse_m + u_m)
    start_g = counts_g.cumsum(0) - counts_g
    rank_m = torch.empty_like(order_m)
    rank_m[order_m] = torch.arange(len(order_m)) - start_g[inverse_m[order_m]]
    hidden_m = rank_m < amount_g[inverse_m]
    share_g = counts_g / amount_g.clamp(min=1)
    return hidden_m, (share_g[inverse_m] * hidden_m).float()


def recovery_mask(p: Prediction, batch: PackedBatch, block: int) -> Tensor:
    """Who sees whom in [prediction ; memory]: bool [b, q+t, q+t]."""
    q, t = p.place.shape[1], batch.tokens.shape[1]
    docs = torch.cat([p.docs, batch.docs], 1)
    same = docs[:, :, None] == docs[:, None, :]
    of, at = (p.positions // block)[:, :, None], batch.positions // block
    seen = torch.zeros_like(same)
    seen[:, :q, :q] = same[:, :q, :q] & (of == of.transpose(1, 2)) & torch.ones_like(same[0, :q, :q]).tril()
    seen[:, :q, q:] = same[:, :q, q:] & (at[:, None, :] < of)
    seen[:, q:, q:] = causal_mask(batch)
    assert seen.shape[1] == q + t
    return seen


@torch.no_grad()
def match_recovery(net: Net, batch: PackedBatch, *, mask_id: int) -> list[bool]:
    """Whether greedy decoding with a window of one mask gives each answer: every answer token is asked for by a mask
    behind the tokens before it, all in one forward, in which blocks are single places."""
    place = two_stream(batch, 1)
    real, at = place >= 0, place.clamp(min=0)
    docs = batch.docs.gather(1, at).masked_fill(~real, -2)
    clean, positions = batch.tokens.gather(1, at), batch.positions.gather(1, at)
    p = Prediction(place, docs, positions, clean, real, real.float())
    states = net.hidden(
        torch.cat([torch.full_like(clean, mask_id), batch.tokens], 1), torch.cat([positions, batch.positions], 1),
        recovery_mask(p, batch, 1),
    )[:, : place.shape[1]]
    laws = net.logits(states[real])
    laws[:, mask_id] = -torch.inf
    right = torch.ones_like(batch.answer)
    rows = torch.arange(len(place))[:, None].expand_as(place)
    right[rows[real], place[real]] = laws.argmax(-1) == clean[real]
    return per_document(right, batch)
