"""What a model is trained for: next token, masked diffusion over the whole text, masked diffusion in blocks.

An objective turns a packed batch into rows, a visibility mask and a loss; the projection on the vocabulary is computed
for the rows that carry a label and for no other. Legend of shapes: b rows, t places, q places of the noisy
stream, k labels, H width, V vocabulary. Masks: ``mask[.., i, j]`` is true where place i sees place j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.training.data import PackedBatch
from stretto.training.noise import Law, hide

__all__ = [
    "Autoregressive", "Balanced", "BlockDiffusion", "MaskedDiffusion", "Net", "Objective", "Loss", "causal_mask",
    "full_mask", "two_stream", "two_stream_mask",
]


class Net(Protocol):
    """The part of a model that an objective needs."""

    def hidden(self, tokens_bt: Tensor, positions_bt: Tensor, mask_btt: Any) -> Tensor:
        """Final-normed states [b, t, H] of rows that see what the mask (or the attention context) says."""
        ...

    def logits(self, hidden_kH: Tensor) -> Tensor:
        """Logits [k, V]."""
        ...

    def balance(self) -> Tensor:
        """Load-balance loss of the routers in the last forward."""
        ...


@dataclass(frozen=True, slots=True)
class Loss:
    """``value`` is differentiated; ``labels`` counts the rows that were projected."""

    value: Tensor
    labels: int


class Objective(Protocol):
    """``batch``: what the objective's own data gives; ``docs`` = -1 marks its padding."""

    def __call__(self, net: Net, batch: Any, generator: torch.Generator) -> Loss: ...


def full_mask(batch: PackedBatch) -> Tensor:
    """Every place sees its whole example: bool [b, t, t]."""
    return batch.docs[:, :, None] == batch.docs[:, None, :]


def causal_mask(batch: PackedBatch) -> Tensor:
    """Every place sees its example up to itself: bool [b, t, t]."""
    return full_mask(batch).tril()


@dataclass(frozen=True, slots=True)
class Autoregressive:
    """Cross-entropy of the next token, averaged over the answers' tokens."""

    prompt_weight: float = 0.0  # weight of the prompt's own tokens, 0 = not learnt

    def __call__(self, net: Net, batch: PackedBatch, generator: torch.Generator) -> Loss:
        hidden = net.hidden(batch.tokens, batch.positions, causal_mask(batch))
        inside_bt = (batch.docs[:, 1:] == batch.docs[:, :-1]) & (batch.docs[:, 1:] >= 0)
        learnt_bt = inside_bt if self.prompt_weight else inside_bt & batch.answer[:, 1:]
        targets_k = batch.tokens[:, 1:][learnt_bt]
        loss_k = F.cross_entropy(net.logits(hidden[:, :-1][learnt_bt]), targets_k, reduction="none")
        if not self.prompt_weight:
            return Loss(loss_k.mean(), len(targets_k))
        weight_k = torch.where(batch.answer[:, 1:][learnt_bt], 1.0, self.prompt_weight)
        return Loss((loss_k * weight_k).sum() / weight_k.sum(), len(targets_k))


@dataclass(frozen=True, slots=True)
class MaskedDiffusion:
    """Kind F (LLaDA): hide answer tokens, predict them from the whole text, weigh by 1/p.

    One noise level per example, stratified over the batch. The prompt is never hidden. With ``shift`` (Dream) the
    state at place i - 1 predicts place i. ``suffix``: share of the examples whose answer is hidden from some place on
    instead of at random places (0 in LLaDA): what decoding in blocks meets, and where sums are learnt, because a random
    half of a worked solution mostly shows the result that is asked for.
    """

    mask_id: int
    shift: bool = False
    law: Law = "bernoulli"
    suffix: float = 0.0

    def __call__(self, net: Net, batch: PackedBatch, generator: torch.Generator) -> Loss:
        answer_bt = batch.answer
        group = torch.arange(len(batch.docs), device=batch.docs.device)[:, None] * batch.docs.shape[1] + batch.docs
        found = hide(group[answer_bt].cpu(), generator, self.law, self.suffix)
        hidden_m, weight_m = (x.to(answer_bt.device) for x in found)
        hide_bt = torch.zeros_like(answer_bt)
        hide_bt[answer_bt] = hidden_m
        noisy = batch.tokens.masked_fill(hide_bt, self.mask_id)
        states = net.hidden(noisy, batch.positions, full_mask(batch))
        rows = states[:, :-1][hide_bt[:, 1:]] if self.shift else states[hide_bt]
        loss_k = F.cross_entropy(net.logits(rows), batch.tokens[hide_bt], reduction="none")
        return Loss((loss_k * weight_m[hidden_m]).sum() / answer_bt.sum(), len(loss_k))


@dataclass(frozen=True, slots=True)
class BlockDiffusion:
    """Kind B (BD3-LM, SDAR): the two-stream form [x_t ; x_0] with blocks aligned to absolute positions.

    Only the blocks that hold answer tokens get a noisy copy. Prompt tokens inside such a block stay clean. One noise
    level per block.
    """

    mask_id: int
    block: int
    law: Law = "count"

    def __call__(self, net: Net, batch: PackedBatch, generator: torch.Generator) -> Loss:
        place_bq = two_stream(batch, self.block)
        seen_bq = place_bq.clamp(min=0)
        docs_bq = batch.docs.gather(1, seen_bq).masked_fill(place_bq < 0, -2)
        positions_bq = batch.positions.gather(1, seen_bq)
        clean_bq = batch.tokens.gather(1, seen_bq)
        maskable_bq = batch.answer.gather(1, seen_bq) & (place_bq >= 0)
        row_bq = torch.arange(len(place_bq), device=place_bq.device)[:, None].expand_as(place_bq)
        t = batch.tokens.shape[1]
        group_m = ((row_bq * t + docs_bq) * t + positions_bq // self.block)[maskable_bq]
        hidden_m, weight_m = (x.to(place_bq.device) for x in hide(group_m.cpu(), generator, self.law))
        hide_bq = torch.zeros_like(maskable_bq)
        hide_bq[maskable_bq] = hidden_m
        states = net.hidden(
            torch.cat([clean_bq.masked_fill(hide_bq, self.mask_id), batch.tokens], 1),
            torch.cat([positions_bq, batch.positions], 1),
            two_stream_mask(docs_bq, positions_bq, batch.docs, batch.positions, self.block),
        )
        rows = states[:, : place_bq.shape[1]][hide_bq]
        loss_k = F.cross_entropy(net.logits(rows), clean_bq[hide_bq], reduction="none")
        return Loss((loss_k * weight_m[hidden_m]).sum() / maskable_bq.sum(), len(loss_k))


@dataclass(frozen=True, slots=True)
class Balanced:
    """``objective`` plus ``weight`` times the load-balance loss of routed layers (Switch transformer)."""

    objective: Objective
    weight: float

    def __call__(self, net: Net, batch: PackedBatch, generator: torch.Generator) -> Loss:
        loss = self.objective(net, batch, generator)
        return Loss(loss.value + self.weight * net.balance(), loss.labels)


def two_stream(batch: PackedBatch, block: int, multiple: int = 16) -> Tensor:
    """The places that need a noisy copy, packed to the left: int64 [b, q], -1 = none.

    q is rounded up to ``multiple``, so that few shapes occur.
    """
    _b, t = batch.tokens.shape
    group_bt = batch.docs * t + batch.positions // block
    wanted_bt = (group_bt[:, :, None] == group_bt[:, None, :]).logical_and(batch.answer[:, None, :]).any(2)
    wanted_bt &= batch.docs >= 0
    most = int(wanted_bt.sum(1).max())
    q = min(-(-most // multiple) * multiple, t)
    order_bt = torch.where(wanted_bt, 0, 1).sort(dim=1, stable=True).indices[:, :q]
    return order_bt.masked_fill(~wanted_bt.gather(1, order_bt), -1)


def two_stream_mask(docs_bq: Tensor, positions_bq: Tensor, docs_bt: Tensor, positions_bt: Tensor, block: int) -> Tensor:
    """Who sees whom in [x_t ; x_0]: bool [b, q+t, q+t].

    Noisy places see their own noisy block and the clean blocks strictly before it; clean places see the clean blocks up
    to their own, and nothing noisy.
    """
    q = docs_bq.shape[1]
    docs = torch.cat([docs_bq, docs_bt], 1)
    blocks = torch.cat([positions_bq, positions_bt], 1) // block
    noisy = torch.arange(docs.shape[1], device=docs.device) < q
    of, at = blocks[:, :, None], blocks[:, None, :]
    from_noisy, to_noisy = noisy[:, None], noisy[None, :]
    seen = torch.where(
        from_noisy, torch.where(to_noisy, of == at, at < of), ~to_noisy & (at <= of),
    )
    return seen & (docs[:, :, None] == docs[:, None, :])
