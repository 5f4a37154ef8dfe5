"""Training of slots: prompt tokens (PPD) and transfer matrices (hidden transfer), on a frozen base.

A slot i of the place n sits at position n + i and estimates token n + i + 1 of its example. Every batch is read once
without gradient; then the slots of some places ("cuts") run through the layers above their entry as rows of their own,
seeing the text up to n and, of their own cut, what ``group_mask`` says: nothing of another cut, nothing behind n. So a
packed forward of many cuts gives each the law that it would have alone, and only the slots' rows take a gradient.

Loss: sum over i of decay^(i-1) KL(p(. | x up to n + i) || law of slot i), p the frozen model's own law in the same
pass; most texts carry the base's own greedy answers, so teacher forcing and a rollout agree. Legend of shapes: b rows,
t places, c cuts, k slots of a cut, m members of a slot, s slot rows of a batch row (k c m, in this order), H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stretto.decoding.slots import group_mask
from stretto.models.context import PackedContext
from stretto.models.entries import check_layers
from stretto.training.data import PackedBatch
from stretto.training.drafters import ranks_of
from stretto.training.objectives import Loss, causal_mask
from stretto.training.parts import FrozenNet, acceptance, ahead

__all__ = ["CLASSES", "HiddenTransfer", "PromptTokens", "SlotRows", "Text", "read", "statistics"]

RANKS = 10  # candidates of a law whose chances are measured
CLASSES = (0.5, 0.8, 0.95, 0.99)  # borders of a law's largest probability: how sure it is


class Text:
    """One pass of the frozen base over a batch: keys and values of every layer, states where asked, laws' logits."""

    def __init__(self, net: FrozenNet, batch: PackedBatch, taps: Sequence[int] = ()):
        b, t = batch.tokens.shape
        self.batch, self.keys, self.values = batch, {}, {}
        self._inner = PackedContext([t] * b, causal_mask(batch), device=batch.tokens.device)
        tapped: dict[int, Tensor] = {}
        with torch.no_grad():
            self.final = net.model.hidden(
                batch.tokens.flatten(), batch.positions.flatten(), self, taps=taps, tapped=tapped
            ).view(b, t, -1)
        self.states = {layer: x.view(b, t, -1) for layer, x in tapped.items()}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = (*self.batch.tokens.shape, *k.shape[1:])
        self.keys[layer], self.values[layer] = k.view(shape), v.view(shape)
        return self._inner.attend(layer, q, k, v)


def read(net: FrozenNet, batch: PackedBatch, taps: Sequence[int] = ()) -> Text:
    return Text(net, batch, taps)


class SlotRows:
    """The rows of the slots of ``cuts`` int64 [b, c] (places; -1 = none) behind a text.

    ``entries[i]``: layer behind which slot i + 1 enters (not falling). ``mask``: see ``group_mask``, or such a matrix.
    """

    def __init__(
        self, net: FrozenNet, text: Text, cuts: Tensor, entries: Sequence[int], *, members: int = 1,
        mask: str | np.ndarray = "ensemble",
    ):
        self.net, self.text, self.cuts, self.entries = net, text, cuts, list(entries)
        batch, (self.b, self.c), self.m = text.batch, cuts.shape, members
        at = cuts.clamp(min=0)
        each = torch.arange(1, len(entries) + 1)[None, :, None]
        here = batch.positions.gather(1, at)[:, None] + each  # [b, k, c]
        self.positions = here[..., None].expand(-1, -1, -1, members).reshape(self.b, -1)
        places = torch.arange(batch.tokens.shape[1])
        same = batch.docs[:, None, :] == batch.docs.gather(1, at)[:, :, None]
        seen = same & (places <= at[:, :, None]) & (cuts >= 0)[:, :, None]  # [b, c, t]
        seen = seen[:, None, :, None].expand(-1, len(entries), -1, members, -1).reshape(self.b, -1, len(places))
        given = group_mask(len(entries), members, mask) if isinstance(mask, str) else mask
        group = torch.from_numpy(given)  # [k, m, k, m]
        own = torch.eye(self.c, dtype=torch.bool)
        both = group[:, None, :, :, None, :] & own[None, :, None, None, :, None]
        size = len(entries) * self.c * members
        self._visible = torch.cat([seen, both.reshape(1, size, size).expand(self.b, -1, -1)], 2)
        self._rows = 0

    def run(self, states: Sequence[Tensor], tapped: dict[int, Tensor] | None = None) -> Tensor:
        """``states[i]`` [b, c, m, H] of slot i + 1 at its entry -> final-normed states [b, k, c, m, H].

        ``tapped`` receives the states [b, rows so far, H] behind every layer from the first entry on."""
        model, x, step = self.net.model, None, self.c * self.m
        for layer in range(model.config.num_hidden_layers + 1):
            new = [s.reshape(self.b, step, -1) for s, at in zip(states, self.entries, strict=True) if at == layer]
            if new:
                x = torch.cat(([] if x is None else [x]) + new, 1)
            if x is not None and tapped is not None:
                tapped[layer] = x
            if x is None or layer == model.config.num_hidden_layers:
                continue
            self._rows = x.shape[1]
            at = self.positions[:, : self._rows].flatten()
            x = model.layers[layer](x.flatten(0, 1), model.rotary(at, x.dtype), self).view(self.b, self._rows, -1)
        return model.norm(x).view(self.b, len(states), self.c, self.m, -1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, s, t = self.b, self._rows, self.text.batch.tokens.shape[1]
        keys = torch.cat([self.text.keys[layer].to(k), k.view(b, s, *k.shape[1:])], 1)
        values = torch.cat([self.text.values[layer].to(v), v.view(b, s, *v.shape[1:])], 1)
        mask = self._visible[:, None, :s, : t + s]
        out = F.scaled_dot_product_attention(
            q.view(b, s, *q.shape[1:]).transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.transpose(1, 2).reshape(b * s, *q.shape[1:])


def draw_cuts(batch: PackedBatch, most: int, generator: torch.Generator | None) -> Tensor:
    """int64 [b, most]: places whose next but one token is an answer's, drawn at random (None: the first), -1 = none."""
    fits = ahead(batch, 2)[1]
    score = -torch.arange(fits.shape[1], dtype=torch.float32).expand(fits.shape)
    if generator is not None:
        score = torch.rand(fits.shape, generator=generator)
    order = score.masked_fill(~fits, -torch.inf).argsort(1, descending=True)[:, :most]
    return order.masked_fill(~fits.gather(1, order), -1)


def laws(net: FrozenNet, states: Tensor) -> Tensor:
    """[..., m, H] -> logits [..., V], the mean over the members."""
    return net.logits(states).float().mean(-2)


def slot_loss(net: FrozenNet, text: Text, cuts: Tensor, states: Tensor, decay: float, loss: str) -> Loss:
    """``states`` [b, k, c, m, H] of the slots."""
    total, labels = states.new_zeros((), dtype=torch.float32), 0
    at = cuts.clamp(min=0)
    places = torch.arange(len(at))[:, None].expand_as(at)
    for i in range(states.shape[1]):
        tokens, valid = ahead(text.batch, i + 2)
        used = valid.gather(1, at) & (cuts >= 0)
        if not used.any():
            continue
        law = laws(net, states[:, i][used])
        if loss == "ce":
            part = F.cross_entropy(law, tokens.gather(1, at)[used])
        else:
            with torch.no_grad():
                wanted = net.logits(text.final[places[used], at[used] + i + 1]).float().log_softmax(-1)
            part = F.kl_div(law.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
        total = total + decay**i * part / states.shape[1]
        labels += int(used.sum())
    return Loss(total, labels)


def statistics(net: FrozenNet, batches: Sequence[PackedBatch], run: Any, k: int) -> dict[str, Any]:
    """What the planner of slots needs, over all places of ``batches``; ``run(batch, cuts)`` gives the slots' states.

    ``hits[d][j][r]`` of ``tries[d][j]``: how often rank r of law d + 1 was right, of class j (``CLASSES`` by its
    largest probability), where the right tokens before were among the candidates; ``seen``: how often each tuple.
    """
    ranks: list[list[Tensor]] = [[] for _ in range(k)]
    sure: list[list[Tensor]] = [[] for _ in range(k)]
    for batch in batches:
        cuts = draw_cuts(batch, int(ahead(batch, 2)[1].sum(1).max()), None)
        states, at = run(batch, cuts), cuts.clamp(min=0)
        for i in range(k):
            tokens, valid = ahead(batch, i + 2)
            law = laws(net, states[:, i][cuts >= 0])
            rank = ranks_of(law, tokens.gather(1, at)[cuts >= 0])
            ranks[i].append(torch.where(valid.gather(1, at)[cuts >= 0], rank, -1))
            sure[i].append(law.softmax(-1).amax(-1))
    rank, borders, classes = [torch.cat(r) for r in ranks], torch.tensor(CLASSES), len(CLASSES) + 1
    kind = [torch.bucketize(torch.cat(p), borders, right=True) for p in sure]
    hits = torch.zeros(k, classes, RANKS, dtype=torch.int64)
    tries = torch.zeros(k, classes, dtype=torch.int64)
    alive = torch.ones_like(rank[0], dtype=torch.bool)
    for i in range(k):
        there = alive & (rank[i] >= 0)
        tries[i] = torch.bincount(kind[i][there], minlength=classes)
        for r in range(RANKS):
            hits[i, :, r] = torch.bincount(kind[i][there & (rank[i] == r)], minlength=classes)
        alive &= (rank[i] >= 0) & (rank[i] < RANKS)
    tuples, counts = torch.stack(kind, 1).unique(dim=0, return_counts=True)
    seen = {"".join(map(str, key)): int(n) for key, n in zip(tuples.tolist(), counts.tolist(), strict=True)}
    return {
        "acceptance": acceptance(rank, RANKS), "hits": hits.tolist(), "tries": tries.tolist(), "seen": seen,
        "classes": list(CLASSES),
    }


class _Vectors(nn.Module):
    def __init__(self, vectors: Tensor):
        super().__init__()
        self.vectors = nn.Parameter(vectors)


class PromptTokens:
    """PPD (arXiv 2405.18628): k x m vectors of the embedding width, and nothing else, are trained."""

    def __init__(
        self, net: FrozenNet, *, tokens: int = 3, members: int = 1, mask: str = "ensemble", cuts: int = 24,
        decay: float = 0.8, loss: str = "kl",
    ):
        self._net, self.cuts, self.decay, self.loss = net, cuts, decay, loss
        self.config: dict[str, Any] = {"tokens": tokens, "members": members, "mask": mask}
        table = net.model.model.embed_tokens.weight.detach().float()
        start = table.mean(0) + 0.1 * table.std(0) * torch.randn(tokens, members, table.shape[1])
        self.module = _Vectors(start)

    def states(self, batch: PackedBatch, cuts: Tensor, text: Text | None = None) -> Tensor:
        """[b, k, c, m, H]"""
        c = self.config
        rows = SlotRows(
            self._net, text or read(self._net, batch), cuts, [0] * c["tokens"], members=c["members"], mask=c["mask"]
        )
        vectors = self.module.vectors.to(self._net.model.dtype)
        return rows.run([v.expand(*cuts.shape, -1, -1) for v in vectors])

    def __call__(self, net: Any, batch: PackedBatch, generator: torch.Generator) -> Loss:
        text, cuts = read(self._net, batch), draw_cuts(batch, self.cuts, generator)
        return slot_loss(self._net, text, cuts, self.states(batch, cuts, text), self.decay, self.loss)

    @torch.no_grad()
    def statistics(self, batches: Sequence[PackedBatch]) -> dict[str, Any]:
        return statistics(self._net, batches, self.states, self.config["tokens"])


class _Matrices(nn.Module):
    """W [k, H, H]; under the name of a layer's, so that Muon trains it."""

    def __init__(self, k: int, width: int):
        super().__init__()
        self.layers = nn.Module()
        self.layers.weight = nn.Parameter(torch.eye(width).repeat(k, 1, 1))


class HiddenTransfer:
    """Hidden transfer (arXiv 2404.12022): W_i [H, H], identity at the start, from the state behind ``entries[i]``
    (default: three slots behind a third of the layers).

    ``chain``: slot i starts from slot i - 1's state at the same layer instead of the real row's.
    """

    def __init__(
        self, net: FrozenNet, *, entries: Sequence[int] = (), chain: bool = False, cuts: int = 24,
        decay: float = 0.8, loss: str = "kl",
    ):
        self._net, self.cuts, self.decay, self.loss = net, cuts, decay, loss
        entries = entries or [net.model.config.num_hidden_layers // 3] * 3
        check_layers(entries, net.model.config.num_hidden_layers, chain)
        self.config: dict[str, Any] = {"entries": list(entries), "chain": chain}
        self.module = _Matrices(len(entries), net.model.config.hidden_size)

    def states(
        self, batch: PackedBatch, cuts: Tensor, text: Text | None = None, *, mask: str | np.ndarray = "ensemble",
        tapped: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """[b, k, c, 1, H]"""
        entries = self.config["entries"]
        text = text or read(self._net, batch, sorted(set(entries)))
        at, starts, before = cuts.clamp(min=0)[..., None], [], None
        for layer, w in zip(entries, self.module.layers.weight, strict=True):
            source = before if self.config["chain"] and before is not None else None
            if source is None:
                real = text.states[layer]
                source = real.gather(1, at.expand(-1, -1, real.shape[2]))
            before = source @ w.T.to(source)
            starts.append(before[:, :, None])
        return SlotRows(self._net, text, cuts, entries, mask=mask).run(starts, tapped)

    def __call__(self, net: Any, batch: PackedBatch, generator: torch.Generator) -> Loss:
        text = read(self._net, batch, sorted(set(self.config["entries"])))
        cuts = draw_cuts(batch, self.cuts, generator)
        return slot_loss(self._net, text, cuts, self.states(batch, cuts, text), self.decay, self.loss)

    @torch.no_grad()
    def statistics(self, batches: Sequence[PackedBatch]) -> dict[str, Any]:
        return statistics(self._net, batches, self.states, len(self.config["entries"]))
