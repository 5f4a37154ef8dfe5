"""The native forward in stages: some layers, somebody's look at the logits that they would give, then the rest.

Each stage is a native forward of its own over a slice of the layers, which reads the states that the stage below wrote:
float32 both times, so the bits are those of one forward. The weights of the stages are packed copies of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stretto.errors import OptionError
from stretto.models.batch import Early, FlatBatch, ForwardResult, KVPool
from stretto.models.entries import Entry
from stretto.models.native import NativeForward
from stretto.models.transformer import Transformer

__all__ = ["StagedForward", "check_early", "slice_layers"]


def slice_layers(model: Transformer, first: int, last: int) -> Transformer:
    """A model of the layers ``first``..``last`` - 1 of ``model``, with its embeddings, final norm and head: the same
    parameters, not copies."""
    c = model.config
    out = Transformer(c.changed(num_hidden_layers=last - first, windows=c.windows[first:last]), device="meta")
    out.model.layers = nn.ModuleList(list(model.layers)[first:last])
    out.model.embed_tokens, out.model.norm = model.model.embed_tokens, model.model.norm
    if hasattr(model, "lm_head"):
        out.lm_head = model.lm_head
    out._packed_head = model._packed_head
    return out


def check_early(early: Early, layers: int) -> None:
    """OptionError for a layer behind which nothing would be left to run, or that does not exist."""
    for layer in early:
        if not 1 <= layer <= layers - 1:
            raise OptionError("early exit layer", layer, f"1..{layers - 1}, the model has {layers} layers")


class StagedForward:
    """Stages of ``model``; those for a set of layers are made when they are first asked for."""

    def __init__(self, model: Transformer, weight_dtype: torch.dtype):
        self.model = model
        self._dtype = "bfloat16" if weight_dtype == torch.bfloat16 else "float32"
        self._parts: dict[tuple[int, ...], list[tuple[int, int, Any]]] = {}
        self._pools: tuple[KVPool | None, dict[tuple[int, int], KVPool]] = (None, {})

    def stages(self, layers: tuple[int, ...]) -> list[tuple[int, int, Any]]:
        """(first, last, forward) of each stage, ``layers`` being the borders."""
        if layers not in self._parts:
            borders = [0, *layers, self.model.config.num_hidden_layers]
            self._parts[layers] = [
                (a, b, NativeForward(slice_layers(self.model, a, b), self._dtype))
                for a, b in pairwise(borders)
            ]
        return self._parts[layers]

    def forward(self, pool: KVPool, batch: FlatBatch, early: Early, known: int | None = None) -> ForwardResult:
        """As the whole forward; ``early[l]`` gets the result behind layer l before the layers above it run."""
        top, hidden, tapped = self.model.config.num_hidden_layers, None, {}
        result = None
        for first, last, part in self.stages(tuple(sorted(early))):
            sub, names = _stage(batch, first, last, top, hidden)
            result = part.forward(self._part(pool, first, last), sub, known)
            tapped |= {names[l]: x for l, x in result.hidden.items() if l in names}
            if last < top:
                hidden = result.hidden[last - first]
                early[last](result)
        assert result is not None
        return ForwardResult(result.logits, tapped, result.argmax)

    def _part(self, pool: KVPool, first: int, last: int) -> KVPool:
        if self._pools[0] is not pool:
            self._pools = pool, {}
        made = self._pools[1]
        if (first, last) not in made:
            made[first, last] = pool.part(first, last)
        return made[first, last]


def _stage(
    batch: FlatBatch, first: int, last: int, top: int, hidden: Tensor | None
) -> tuple[FlatBatch, dict[int, int]]:
    """The batch of one stage, and its taps by the stage's numbers: {tap of the stage: tap of the whole}."""
    names = {t - first: t for t in batch.taps if first < t <= last or t == first == 0}
    if last == top and -1 in batch.taps:
        names[-1] = -1
    taps = set(names) | ({last - first} if last < top else set())
    rows = np.arange(batch.n, dtype=np.int32) if hidden is not None else batch.embed_rows
    sub = replace(
        batch, taps=tuple(sorted(taps)), embeds=hidden if hidden is not None else batch.embeds, embed_rows=rows,
        entries=[e for entry in batch.entries for e in _entry(entry, first, last)],
    )
    return sub, names


def _entry(entry: Entry, first: int, last: int) -> Iterator[Entry]:
    """What the stage must know of rows that enter: none that are there, and those that come later stay out of it."""
    if first < entry.layer <= last or entry.layer == first == 0:
        yield replace(entry, layer=entry.layer - first)
    elif entry.layer > last:
        yield replace(entry, layer=last - first, sources=np.zeros_like(entry.sources))
