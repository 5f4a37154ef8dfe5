"""Clover: a chain of light heads, each of which knows the token that was guessed before it.

An augmenting block with K/V of its own reads the model's last states once a step; from its output h_0 and the vector of
the root each head takes the state of the head before and the token guessed there. Guesses grow a small tree, level
by level: of a node's guesses the nucleus stays (``top_p``), without those far behind the first (``min_ratio``), and the
best paths share the budget ``tree_size``. version=1: arXiv 2405.00263, version=2: Clover-2, 2408.00264.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.decoding.ar import require_causal
from stretto.decoding.companion import Companion
from stretto.decoding.costs import Typical
from stretto.decoding.guessing import SURE, Growth, Guide, Items, Offer, extra_of, grow, last_states, least_gain
from stretto.decoding.options import option
from stretto.decoding.planner import room
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.errors import OptionError
from stretto.models.heads import CloverHeads

__all__ = ["Clover", "Options"]

TABLE = 16_000_000  # values of the LM head up to which tables of the vocabulary are made


@dataclass(frozen=True, kw_only=True)
class Options:
    """Clover (Xiao et al., 2024)."""

    version: int = option(1, "1 = Clover, 2 = Clover-2", choices=(1, 2))
    adapter: str = option("auto", "the heads: zoo name, folder, or auto = those that ship for the model")
    depth: int = option(0, "H, heads that are used (0 = all that were trained)", low=0, high=16)
    tree_size: int = option(4, "budget: most tokens drafted in a step", low=1, high=63)
    topk: int = option(1, "guesses of a node before pruning; 1 = a chain, the paper's figure has 4", low=1, high=10)
    top_p: float = option(0.8, "nucleus of a node's guesses", low=0.0, high=1.0)
    min_ratio: float = option(0.25, "least probability of a guess, in parts of the best one's", low=0.0, high=1.0)


class Clover:
    """Light heads that know the tokens guessed before them: small trees with high acceptance."""

    name = "clover"
    lossless = True
    aliases = ("clover2",)
    kinds = ("causal",)
    taps: ClassVar[tuple[int, ...]] = (-1,)

    def __init__(self, host: Host, options: Options):
        self._host, self._options = host, options
        adapter = host.open_adapter("clover" if options.version == 1 else "clover2", options.adapter)
        self.part = part = CloverHeads(host.config, **adapter.config)
        adapter.into(part)
        part.to(host.runner.pool.k.device)
        if options.depth > part.heads and part.version == 1:
            raise OptionError("clover.depth", options.depth, f"at most {part.heads}, all that {adapter.source} has")
        if options.depth > part.heads:
            host.notes.append(f"clover.depth={options.depth}: the heads were trained for {part.heads}")
        self._depth = options.depth or part.heads
        self.companion = Companion(host, part.layers, shift=part.version == 2) if len(part.layers) else None
        self.extra = extra_of(adapter, host, self.taps, self.companion and self.companion.runner)
        self.guide = Guide(host, adapter.statistics, self._depth, self.taps)
        self._level = Typical()
        self._build()

    @torch.no_grad()
    def _build(self) -> None:
        """Weights as the kernels want them; what depends on the token alone as tables, if the vocabulary is small."""
        part, runner = self.part, self._host.runner
        self._lm_head, decoder = runner.lm_head, part.decoder
        self._table = None
        if self._lm_head.numel() <= TABLE:
            self._table = self._of(range(len(self._lm_head)))
        self._query = runner.product(decoder.q.weight.detach(), decoder.q.bias.detach())
        if part.version == 1:
            self._mlps = [runner.product(w.detach()) for w in part.weight]
        else:
            self._mlps = [runner.product(part.first.weight.detach()), runner.product(part.later.weight.detach())]
        self._chain: Any = self._native_chain() if runner.native is not None and self._options.topk == 1 else None

    def _native_chain(self) -> Any:
        """The heads in C, for chains of a lone sequence; None without the tables."""
        from stretto.models.native_heads import CloverChain

        part, runner = self.part, self._host.runner
        if self._table is None:
            return None
        mats = list(part.weight) if part.version == 1 else [part.first.weight, part.later.weight]
        return CloverChain(
            runner.native, runner.vocabulary, SURE, version=part.version, depth=self._depth, table=self._table,
            norm=part.decoder.norm.weight, query=(part.decoder.q.weight, part.decoder.q.bias), mats=mats,
            out_norm=part.norm.weight if part.version == 2 else None, eps=part.decoder.eps,
        )

    def _of(self, tokens: Seq[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors e [n, H] of tokens (normalised rows of W_LM), their keys, normalised, and values [n, A, D]."""
        if self._table is not None:
            return tuple(t[list(tokens)] for t in self._table)  # type: ignore[return-value]
        decoder = self.part.decoder
        e = F.normalize(self._lm_head[list(tokens)].float(), dim=-1)
        keys, values = (x.unflatten(-1, (decoder.heads, -1)) for x in (decoder.k(e), decoder.v(e)))
        return e, F.normalize(keys, dim=-1), values

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
        """Trees for all sequences, one small batch a level."""
        o, rate = self._options, self.guide.trust.rate
        if self._chain is not None and len(seqs) == 1:
            return [self._lone(seqs, min(depth, o.tree_size, room(seqs[0])))]
        growths = [
            Growth(seq, rate, min(room(seq), o.tree_size), top_p=o.top_p, min_ratio=o.min_ratio) for seq in seqs
        ]
        h0 = self._augmented(seqs)
        state, logits = self._advance(0, [(growth, 0) for growth in growths], h0)
        grow(
            self.guide.planner, growths, state, logits, depth=depth, topk=o.topk, beam=o.tree_size,
            advance=self._advance, level=self._level,
        )
        return [growth.offer() for growth in growths]

    def _lone(self, seqs: list[Sequence], most: int) -> Offer:
        """A chain for one sequence, without coming back here between the heads."""
        (seq,), rate = seqs, self.guide.trust.rate
        h0, start = self._augmented(seqs)[0], time.perf_counter()
        tokens, sure = self._chain(seq.tokens[-1], h0, most, rate, least_gain(self.guide.planner, self._level))
        self._level.learn((time.perf_counter() - start) / len(tokens))
        return Offer.empty(seq).chain(tokens, sure, rate, most)

    def _augmented(self, seqs: list[Sequence]) -> Tensor:
        """h_0 [n, H] of every sequence's root: the augmenting block on the rows that it has not read."""
        part, companion = self.part, self.companion
        roots = [seq.tokens[-1] for seq in seqs]
        if companion is None:
            return part.entry(last_states(self._host, -1, seqs), self._of(roots)[0])
        companion.begin()
        rows, features = [], []
        for seq in seqs:
            text = companion.missing(seq)
            if part.version == 2:  # the root's row reads its vector, and is read again when the root is cached
                text.tokens = [*text.tokens, seq.tokens[-1]]
                text.slots = np.concatenate([text.slots, companion.scratch(1)])
            elif not text.tokens:  # proposed before, but the step was dropped
                at = text.position - 1
                text.tokens, text.position = [seq.tokens[at]], at
                text.slots, text.context = seq.view.slots[at:], text.context[:at]
            rows.append(text)
            features += companion.features(seq, text, (-1,))
        f = torch.cat(features) if len(features) > 1 else features[0]
        if part.version == 2:
            f = part.entry(f, self._of([t for r in rows for t in r.tokens])[0])
        return companion.forward(rows, f)[0][np.cumsum([len(r.tokens) for r in rows]) - 1]

    def _advance(self, depth: int, items: Items, h: Tensor) -> tuple[Tensor, Tensor]:
        """(h_{depth + 1}, logits) of nodes from the states of their parents."""
        part = self.part
        tokens = [growth.token[node] for growth, node in items]
        if part.version == 2 and depth == 0:
            state = self._mlps[0](h)
        else:
            e, keys, values = self._of(tokens)
            q = self._query(part.decoder.norm(h)).unflatten(-1, (part.decoder.heads, -1))
            weight = (F.normalize(q, dim=-1) * keys).sum(-1, keepdim=True)
            g = h + (weight * values).flatten(1)
            if part.version == 1:
                state = g + F.silu(self._mlps[depth](g))
            else:
                state = self._mlps[1](torch.cat([g, e], -1))
        return state, self._host.runner.head(part.out(state))
