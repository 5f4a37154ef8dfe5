"""Medusa: extra heads on the model's last state guess the tokens after the next one, each by itself.

Head i reads the state of the last cached row and guesses the token i + 1 places behind the root. The best guesses
of all heads make a chain, or a tree whose branches are combinations of them. (Medusa-1, arXiv 2401.10774.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from stretto.decoding.ar import require_causal
from stretto.decoding.guessing import Guide, Offer, best_tokens, extra_of, last_states
from stretto.decoding.options import option
from stretto.decoding.planner import room
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.errors import OptionError
from stretto.models.heads import MedusaHeads

__all__ = ["Medusa", "Options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Medusa heads (Cai et al., 2024)."""

    adapter: str = option("auto", "the heads: zoo name, folder, or auto = those that ship for the model")
    heads: int = option(0, "heads that are used (0 = all that were trained)", low=0, high=16)
    topk: int = option(1, "guesses of each head; 1 = a chain, more = a tree", low=1, high=10)
    num_draft_tokens: int = option(16, "most tokens drafted in a step: nodes of the tree", low=1, high=63)


class Medusa:
    """Extra heads guess several tokens at once from the last state: the cheapest trained drafter."""

    name = "medusa"
    lossless = True
    kinds = ("causal",)
    taps: ClassVar[tuple[int, ...]] = (-1,)

    def __init__(self, host: Host, options: Options):
        self._host, self._options = host, options
        adapter = host.open_adapter(self.name, options.adapter)
        part = MedusaHeads(host.config, **adapter.config)
        adapter.into(part)
        if options.heads > part.heads:
            raise OptionError("medusa.heads", options.heads, f"at most {part.heads}, all that {adapter.source} has")
        self._heads, width = options.heads or part.heads, host.config.hidden_size
        self._product = host.runner.product(part.weight.detach()[: self._heads * width])
        self.extra = extra_of(adapter, host, self.taps)
        self.guide = Guide(host, adapter.statistics, self._heads, self.taps)

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
        """Two products for all sequences, whatever the depth."""
        options, heads, rate = self._options, self._heads, self.guide.trust.rate
        f = last_states(self._host, -1, seqs)
        h = F.silu(self._product(f)).view(len(f), heads, -1).add_(f[:, None])[:, :depth]
        tokens, sure = best_tokens(self._host.runner.head(h.reshape(len(f) * depth, -1)), options.topk)
        offers = []
        for i, seq in enumerate(seqs):
            limit, mine = min(room(seq), options.num_draft_tokens), slice(i * depth, (i + 1) * depth)
            offer = Offer.empty(seq)
            if options.topk == 1:
                offer.chain([t[0] for t in tokens[mine]], [p[0] for p in sure[mine]], rate, limit)
            else:
                levels = [list(zip(t, p, strict=True)) for t, p in zip(tokens[mine], sure[mine], strict=True)]
                offer.product(levels, rate, limit)
            offers.append(offer)
        return offers
