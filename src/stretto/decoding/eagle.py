"""EAGLE: one extra decoder layer foresees the model's next features, and its head's tokens are the draft.

Row p of the text reads the embedding of token p and the model's feature of row p - 1; its output stands for the
feature of row p. Deeper guesses read the layer's own outputs. version=1: EAGLE's layer on the last features (arXiv
2401.15077), version=3: EAGLE-3's on a mix of three depths (2503.01840). Trees grow as in EAGLE-2 (2406.16858): the
best ``topk`` nodes of a level are expanded, and the best nodes of all levels are verified.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stretto.decoding.ar import require_causal
from stretto.decoding.companion import Companion
from stretto.decoding.costs import Typical
from stretto.decoding.drafting import Rows
from stretto.decoding.guessing import SURE, Growth, Guide, Items, Offer, extra_of, grow, least_gain
from stretto.decoding.options import option
from stretto.decoding.planner import room
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.errors import InputError
from stretto.models.adapter import Adapter
from stretto.models.heads import EagleLayer

__all__ = ["Eagle", "Options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """EAGLE (Li et al., 2024, 2025)."""

    version: int = option(
        0, "1 = the layer of EAGLE, 3 = that of EAGLE-3, 0 = of those that there are the one that promises more tokens",
        choices=(0, 1, 3),
    )
    adapter: str = option("auto", "the layer: zoo name, folder, or auto = the one that ships for the model")
    depth: int = option(5, "levels of the draft", low=1, high=16)
    topk: int = option(1, "guesses of each node, and nodes expanded at a level; 1 = a chain", low=1, high=10)
    num_draft_tokens: int = option(16, "most tokens drafted in a step: nodes of the tree", low=1, high=63)


def _adapter(host: Host, options: Options) -> Adapter:
    """The layer of the version asked for, or of the better one: tokens a forward by the acceptance in training."""
    found: list[Adapter] = []
    for version, kind in ((3, "eagle3"), (1, "eagle")):
        if options.version in (0, version):
            try:
                found.append(host.open_adapter(kind, options.adapter))
            except InputError:
                if options.version or (version == 1 and not found):
                    raise
    return max(found, key=lambda a: np.cumprod([row[0] for row in a.statistics.get("acceptance", []) if row]).sum())


class Eagle:
    """An extra layer foresees the model's features: the drafter with the highest acceptance."""

    name = "eagle"
    lossless = True
    aliases = ("eagle2",)
    kinds = ("causal",)

    def __init__(self, host: Host, options: Options):
        self._host, self._options = host, options
        adapter = _adapter(host, options)
        part = EagleLayer(host.config, **adapter.config)
        adapter.into(part)
        self.taps = part.taps
        if options.depth > part.depth:
            host.notes.append(f"eagle.depth={options.depth}: the layer was trained for {part.depth} levels")
        product = host.runner.product
        self._fc = product(part.fc.weight.detach(), part.fc.bias.detach())
        self._mix = product(part.mix.weight.detach(), part.mix.bias.detach()) if part.mix is not None else None
        self.companion = Companion(host, part.layers, shift=True, norm=part.norm)
        self.extra = extra_of(adapter, host, self.taps, self.companion.runner)
        self.guide = Guide(host, adapter.statistics, options.depth, self.taps)
        self._level = Typical()
        self._chain: Any = self._native_chain(part) if host.runner.native is not None and options.topk == 1 else None

    def _native_chain(self, part: EagleLayer) -> Any:
        """The layer in C, for chains of a lone sequence."""
        from stretto.models.native_heads import EagleChain

        runner = self._host.runner
        return EagleChain(
            runner.native, runner.vocabulary, SURE, layer=self.companion.runner.native, depth=self._options.depth,
            entry=(part.fc.weight, part.fc.bias), normed=part.norm is not None,
        )

    def admit(self, seq: Sequence) -> None:
        require_causal(self._host, self.name)
        self.guide.admit(seq)

    def prefill(self, seq: Sequence) -> int:
        return len(seq.tokens) - 1

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        return self.guide.propose(seqs, self._draft)

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        return self.guide.commit(seqs, steps, outcomes)

    def release(self, seq: Sequence) -> None:
        self.guide.release(seq)

    def preemptible(self, seq: Sequence) -> bool:
        return True

    @torch.inference_mode()
    def _draft(self, seqs: list[Sequence], depth: int) -> list[Offer]:
        """Trees for all sequences, one forward of the layer a level."""
        options, companion = self._options, self.companion
        rate = self.guide.trust.rate
        if self._chain is not None and len(seqs) == 1:
            return [self._lone(seqs[0], min(depth, options.num_draft_tokens, room(seqs[0])))]
        growths = [Growth(seq, rate, min(room(seq), options.num_draft_tokens)) for seq in seqs]
        companion.begin()
        rows, features = [], []
        for growth in growths:
            seq, text = growth.seq, companion.missing(growth.seq)
            root = companion.scratch(1)
            growth.slots[0], growth.start = root, companion.start(seq)
            tokens, slots = [*text.tokens, seq.tokens[-1]], np.concatenate([text.slots, root])
            rows.append(Rows(tokens, text.position, slots, text.context))
            features.append(companion.features(seq, rows[-1], self.taps))
        g = torch.cat([torch.cat(f, -1) for f in features]) if len(seqs) > 1 else torch.cat(features[0], -1)
        last = np.cumsum([len(r.tokens) for r in rows]) - 1
        state, out = self._rows(rows, g if self._mix is None else self._mix(g))
        grow(
            self.guide.planner, growths, state[last], self._host.runner.head(out[last]), depth=depth,
            topk=options.topk, beam=options.topk, advance=self._advance, level=self._level,
        )
        return [growth.offer() for growth in growths]

    def _lone(self, seq: Sequence, most: int) -> Offer:
        """A chain for one sequence, without coming back here between the levels."""
        companion, rate = self.companion, self.guide.trust.rate
        companion.begin()
        text = companion.missing(seq)
        rows = Rows([*text.tokens, seq.tokens[-1]], text.position, text.slots, text.context)
        features = torch.cat(companion.features(seq, rows, self.taps), -1)
        if self._mix is not None:
            features = self._mix(features)
        slots, start = np.concatenate([text.slots, companion.scratch(most)]), time.perf_counter()
        tokens, sure = self._chain(
            companion.runner.pool, text.context, rows.tokens, text.position, slots, features, rate,
            least_gain(self.guide.planner, self._level),
        )
        self._level.learn((time.perf_counter() - start) / len(tokens))
        return Offer.empty(seq).chain(tokens, sure, rate, most)

    def _advance(self, depth: int, items: Items, state: Tensor) -> tuple[Tensor, Tensor]:
        """The layer on rows of guesses: their features are the outputs of their parents."""
        rows = []
        for growth, node in items:
            path, slot = growth.path(node), self.companion.scratch(1)
            growth.slots[node] = slot
            above = [growth.slots[n] for n in (0, *path[:-1])]
            text = growth.seq.view.slots[1:]
            seen = np.concatenate([text[growth.start :], *above])
            rows.append(Rows([growth.token[node]], len(text) + depth, slot, seen))
        state, out = self._rows(rows, state)
        return state, self._host.runner.head(out)

    def _rows(self, rows: Seq[Rows], g: Tensor) -> tuple[Tensor, Tensor]:
        """(outputs [n, H], inputs of the LM head [n, H]) of rows with features g."""
        tokens = torch.tensor([t for r in rows for t in r.tokens])
        e = self._host.runner.model.embed(tokens.to(g.device)).float()
        return self.companion.forward(list(rows), self._fc(torch.cat([e, g], -1)))
