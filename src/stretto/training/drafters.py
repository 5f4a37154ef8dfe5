"""The objectives of drafters: Medusa heads, Clover's chain, EAGLE's layer.

All are teacher-forced: at a place n of a text, head or depth i = 0, 1, .. foresees token n + 2 + i (token n + 1 is the
model's own). Legend of shapes: b rows, t places, k places that count, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.models.context import PackedContext
from stretto.models.heads import CloverHeads, EagleLayer, MedusaHeads, run_layers
from stretto.training.data import PackedBatch
from stretto.training.objectives import Loss, causal_mask
from stretto.training.parts import FrozenNet, acceptance, ahead

__all__ = ["Clover", "Eagle", "Guess", "Medusa", "ranks_of"]


@dataclass(slots=True)
class Guess:
    """What one depth says of the places that count at depth 0. ``valid`` [k]: the answer reaches that far."""

    state: Tensor  # [k, H], the input of the LM head
    tokens: Tensor  # int64 [k]
    valid: Tensor  # bool [k]


def ranks_of(logits_kV: Tensor, tokens_k: Tensor) -> Tensor:
    """int64 [k]: how many tokens have larger logits than the right one."""
    return (logits_kV > logits_kV.gather(1, tokens_k[:, None])).sum(1)


def _targets(batch: PackedBatch, depth: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """(places [b, t] that count, (tokens [k], valid [k]) of every depth)"""
    ahead_of = [ahead(batch, 2 + i) for i in range(depth)]
    used = ahead_of[0][1]
    return used, [(tokens[used], valid[used]) for tokens, valid in ahead_of]


def _hard(guess: Guess, head: Tensor) -> Tensor:
    """Cross-entropy against the text."""
    return F.cross_entropy(F.linear(guess.state[guess.valid], head).float(), guess.tokens[guess.valid])


def _soft(guess: Guess, head: Tensor, features: Tensor) -> Tensor:
    """Cross-entropy against the model's own law, given its ``features`` [k, H] at the row that decides the token."""
    with torch.no_grad():
        law = F.linear(features[guess.valid], head).float().softmax(-1)
    return F.cross_entropy(F.linear(guess.state[guess.valid], head).float(), law)


@torch.no_grad()
def _measure(
    guesses: Callable[[PackedBatch], list[Guess]], head: Tensor, batches: Sequence[PackedBatch]
) -> dict[str, Any]:
    """Acceptance by depth and rank along the text, and how often the right token is among the first 1 and 5."""
    ranks: list[list[Tensor]] = []
    for batch in batches:
        for i, guess in enumerate(guesses(batch)):
            rank = ranks_of(F.linear(guess.state.float(), head), guess.tokens)
            if len(ranks) <= i:
                ranks.append([])
            ranks[i].append(torch.where(guess.valid, rank, -1))
    flat = [torch.cat(r) for r in ranks]
    return {
        "acceptance": acceptance(flat),
        "top1": [round(float((r[r >= 0] < 1).float().mean()), 4) for r in flat],
        "top5": [round(float((r[r >= 0] < 5).float().mean()), 4) for r in flat],
    }


def _shifted(x_bt: Tensor, distance: int) -> Tensor:
    """[b, t, ..]: what stands ``distance`` places on; zeros behind the end."""
    out = torch.zeros_like(x_bt)
    out[:, : x_bt.shape[1] - distance] = x_bt[:, distance:]
    return out


class Medusa:
    """Cross-entropy of every head, weighed by 0.8^i (Medusa-1: the model is frozen)."""

    DECAY = 0.8

    def __init__(self, net: FrozenNet, *, heads: int = 4):
        self._net, self._heads = net, heads
        self.module = MedusaHeads(net.model.config, heads=heads)
        self.config: dict[str, Any] = {"heads": heads}

    def _guesses(self, batch: PackedBatch) -> list[Guess]:
        used, targets = _targets(batch, self._heads)
        h = self.module(self._net.features(batch)[-1][used])
        return [Guess(h[:, i], *target) for i, target in enumerate(targets)]

    def __call__(self, net: Any, batch: PackedBatch, generator: torch.Generator) -> Loss:
        guesses = self._guesses(batch)
        losses = [self.DECAY**i * _hard(g, self._net.head) for i, g in enumerate(guesses)]
        return Loss(torch.stack(losses).sum(), sum(int(g.valid.sum()) for g in guesses))

    def statistics(self, batches: Sequence[PackedBatch]) -> dict[str, Any]:
        return _measure(self._guesses, self._net.head, batches)


class Clover:
    """Version 1: cross-entropy against the text, every head alike. Version 2: 0.7^i (cross-entropy against the model's
    law + 10 SmoothL1 between the head's state and the model's true one)."""

    DECAY, REGRESSION = 0.7, 10.0

    def __init__(self, net: FrozenNet, **options: Any):
        self._net, self.config = net, dict(options)
        self.module = CloverHeads(net.model.config, **options)
        self._vectors = F.normalize(net.head.float(), dim=-1)
        if len(self.module.layers) and options.get("ffn") == net.model.config.intermediate_size:
            for block in self.module.layers:
                block.load_state_dict(net.model.layers[-1].state_dict())

    def _guesses(self, batch: PackedBatch) -> tuple[list[Guess], Tensor, Tensor]:
        """The heads' guesses; the features [b, t, H], and the places that count."""
        module, (used, targets) = self.module, _targets(batch, self.module.heads)
        f = self._net.features(batch)[-1]
        b, t, width = f.shape
        e0 = self._vectors[_shifted(batch.tokens, 1)].view(b * t, width)
        ctx = PackedContext([t] * b, causal_mask(batch), device=f.device)
        angles = self._net.model.rotary(batch.positions.flatten(), f.dtype)
        h = run_layers(module.layers, module.entry(f.view(b * t, width), e0), angles, ctx).view(b, t, width)
        es = [self._vectors[_shifted(batch.tokens, 1 + i)][used] for i in range(module.heads)]
        states = [module.out(h) for h in module.chain(h[used], es)]
        return [Guess(s, *target) for s, target in zip(states, targets, strict=True)], f, used

    def __call__(self, net: Any, batch: PackedBatch, generator: torch.Generator) -> Loss:
        guesses, f, used = self._guesses(batch)
        total: Any = 0.0
        for i, guess in enumerate(guesses):
            if self.module.version == 1:
                total = total + _hard(guess, self._net.head)
                continue
            true = _shifted(f, 1 + i)[used]
            regression = F.smooth_l1_loss(guess.state[guess.valid].float(), true[guess.valid].float())
            total = total + self.DECAY**i * (_soft(guess, self._net.head, true) + self.REGRESSION * regression)
        return Loss(total, sum(int(g.valid.sum()) for g in guesses))

    def statistics(self, batches: Sequence[PackedBatch]) -> dict[str, Any]:
        return _measure(lambda batch: self._guesses(batch)[0], self._net.head, batches)


class Eagle:
    """Version 1: SmoothL1 of features and soft cross-entropy one step ahead, uniform noise on the features read.
    Version 3: soft cross-entropy over ``depth`` steps that feed back the layer's own outputs, weighed by 0.8^i."""

    DECAY, NOISE, CROSS_ENTROPY = 0.8, 0.1, 1.0  # EAGLE's 0.1 is for a day of training; here minutes must do

    def __init__(self, net: FrozenNet, *, version: int = 1, depth: int = 5, ffn: int = 256):
        self._net, self._depth = net, depth
        self.module = EagleLayer(net.model.config, version=version, ffn=ffn, depth=depth)
        self.config: dict[str, Any] = {"version": version, "depth": depth, "ffn": ffn}

    def _guesses(
        self, batch: PackedBatch, depth: int, noise: torch.Generator | None
    ) -> tuple[list[Guess], Tensor, Tensor]:
        module, model = self.module, self._net.model
        used, targets = _targets(batch, depth)
        taps = sorted({-1, *module.taps})
        states = self._net.features(batch, taps)
        b, t, width = states[-1].shape
        rows = [states[l].reshape(b * t, width) for l in module.taps]
        if noise is not None and module.version == 1:
            shake = torch.rand(rows[0].shape, generator=noise).to(rows[0].device)
            rows = [r + (shake - 0.5) * 2 * self.NOISE for r in rows]
        embeds = [model.embed(_shifted(batch.tokens, 1 + j).flatten()).to(rows[0].dtype) for j in range(depth)]
        angles = [model.rotary(batch.positions.flatten() + j, rows[0].dtype) for j in range(depth)]
        outs = module.unroll(module.feature(rows), embeds, angles, causal_mask(batch))
        guesses = [
            Guess(module.out(a).view(b, t, width)[used], *target) for a, target in zip(outs, targets, strict=True)
        ]
        return guesses, states[-1], used

    def __call__(self, net: Any, batch: PackedBatch, generator: torch.Generator) -> Loss:
        depth = 1 if self.module.version == 1 else self._depth
        guesses, f, used = self._guesses(batch, depth, generator)
        total: Any = 0.0
        for i, guess in enumerate(guesses):
            true = _shifted(f, 1 + i)[used]
            loss = self.CROSS_ENTROPY * _soft(guess, self._net.head, true)
            if self.module.version == 1:
                loss = loss + F.smooth_l1_loss(guess.state[guess.valid].float(), true[guess.valid].float())
            total = total + self.DECAY**i * loss
        return Loss(total, sum(int(g.valid.sum()) for g in guesses))

    def statistics(self, batches: Sequence[PackedBatch]) -> dict[str, Any]:
        return _measure(lambda batch: self._guesses(batch, self._depth, None)[0], self._net.head, batches)
