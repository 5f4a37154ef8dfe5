"""The canvas of masked diffusion: which rows a forward evaluates, and whose keys and values stay.

Two kinds of models, two classes with the same methods. ``FullCanvas``: prompt and masks of all
max_tokens see each other; nothing cached is exact. ``BlockCanvas``: a row sees the blocks before
its own and all of its own; finished blocks are cached exactly. Both decode one *window* of the
canvas at a time, from left to right; positions are absolute.

``shift`` models: the logits at i - 1 predict position i, so the row before the window comes with
it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stretto.engine.types import FULL, Sequence, Step
from stretto.models.config import ModelConfig

__all__ = ["Ask", "BlockCanvas", "Canvas", "FullCanvas"]


@dataclass(slots=True)
class Canvas:
    """One sequence as far as it is decided. ``ids`` holds the mask id wherever it is not."""

    ids: list[int]
    mask: int
    end: int  # nothing from here on is decided: max_tokens, or behind the first final end-of-text
    start: int = 0  # the window is [start, stop)
    stop: int = 0
    count: int = 0  # masks in the window when it was entered
    turn: int = 0  # forwards spent on the window
    base: int = 0  # first position of the unfinished block (block-causal models)
    decided: dict[int, int] = field(default_factory=dict)  # position -> number of the forward
    logprobs: dict[int, dict[int, float]] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)  # the canvas whose K/V is cached (full attention)
    credit: Any = None

    def masked(self) -> list[int]:
        """The positions of the window that are still to be decided."""
        return [i for i in range(self.start, min(self.stop, self.end)) if self.ids[i] == self.mask]

    def enter(self, start: int, stop: int) -> None:
        self.start, self.stop, self.turn = start, stop, 0
        self.count = len(self.masked())

    def decide(self, position: int, token: int, forward: int, *, ends: bool) -> None:
        self.ids[position] = token
        self.decided[position] = forward
        if ends:
            self.end = min(self.end, position + 1)


@dataclass(slots=True)
class Ask:
    """Step.extra: ``positions`` that the rows of Step.logits predict; ``whole`` = the canvas in the
    step's first rows; ``keep`` = rows whose K/V stays whatever is decided."""

    positions: list[int]
    whole: list[int] | None = None
    keep: Seq[int] = ()


class FullCanvas:
    """Full attention, semi-autoregressive windows of ``length``.

    ``cache`` "none": every forward evaluates the whole canvas. Else a window begins with the whole
    canvas, and again every ``refresh`` forwards; between them "prefix" evaluates the window and all
    behind it, "dual" the window and ``vicinity`` rows on both sides, on the K/V of the rest. A
    preempted sequence evaluates the canvas of its last refresh once more, beside the rows of its
    next forward: that costs rows, no forward, and gives the same K/V.
    """

    def __init__(
        self, config: ModelConfig, mask: int, *, length: int, cache: str, refresh: int,
        vicinity: int,
    ):
        self._mask, self._length, self._cache = mask, length, cache
        self._refresh, self._vicinity, self._shift = refresh, vicinity, int(config.shift)

    def open(self, seq: Sequence) -> Canvas:
        ids = list(seq.tokens) + [self._mask] * seq.params.max_tokens
        canvas = Canvas(ids, self._mask, len(ids))
        self.advance(seq, canvas)
        return canvas

    def slots(self, seq: Sequence) -> int:
        """The most cache slots that the sequence ever holds."""
        n = seq.prompt_len + seq.params.max_tokens
        if self._cache == "none":
            return n
        rows = seq.params.max_tokens
        if self._cache == "dual":
            rows = self._length + 2 * self._vicinity
        return n + min(n, rows + self._shift)

    def prefill(self, seq: Sequence, canvas: Canvas) -> int:
        return 0

    def step(self, seq: Sequence, canvas: Canvas) -> Step:
        ids, asked = canvas.ids, canvas.masked()
        predict = [max(0, i - self._shift) for i in asked]
        if self._fresh(canvas):
            whole = list(ids)
            return Step(whole, see=FULL, logits=predict, extra=Ask(asked, whole))
        a, b = self._rows(canvas)
        rows = list(range(a, b))
        if len(seq.view) or b - a == len(ids):
            return Step(ids[a:b], rows, FULL, logits=[i - a for i in predict], extra=Ask(asked))
        n = len(ids)
        see = np.ones((n + b - a,) * 2, bool)
        see[:n, n:] = see[n:, a:b] = False
        return Step(
            canvas.seen + ids[a:b], [*range(n), *rows], see, logits=[n + i - a for i in predict],
            extra=Ask(asked, canvas.seen),
        )

    def kept(self, seq: Sequence, canvas: Canvas, step: Step) -> dict[str, Any]:
        """What happens to the K/V, after ``advance``: fields of Commit."""
        if self._fresh(canvas):
            return {"truncate": 0}
        if step.extra.whole is None:
            return {}
        canvas.seen = step.extra.whole
        a, b = self._rows(canvas)
        return {"keep": [*range(a), *range(b, len(canvas.ids))]}

    def advance(self, seq: Sequence, canvas: Canvas) -> None:
        """Go to the next window when this one is decided: masks inside the prompt first."""
        ids, prompt = canvas.ids, seq.prompt_len
        start = next((i for i in range(canvas.stop, canvas.end) if ids[i] == self._mask), None)
        if start is not None:
            canvas.enter(start, min(start + self._length, prompt if start < prompt else len(ids)))

    def _fresh(self, canvas: Canvas) -> bool:
        """Whether the next forward evaluates the whole canvas."""
        if self._cache == "none" or canvas.turn == 0:
            return True
        return self._refresh > 0 and canvas.turn % self._refresh == 0

    def _rows(self, canvas: Canvas) -> tuple[int, int]:
        """First and last + 1 position that a forward between refreshes evaluates."""
        start, stop, n = canvas.start - self._shift, canvas.stop, len(canvas.ids)
        if self._cache == "prefix":
            return max(0, start), n
        return max(0, start - self._vicinity), min(n, stop + self._vicinity)


class BlockCanvas:
    """Block-causal attention in blocks of ``config.block_size``, aligned to absolute positions.

    Rows of the unfinished block are evaluated in full, masks included, and not kept. A finished
    block is evaluated once more, with its final tokens, in the first forward of the next one: its
    K/V is then exact for ever. ``length``: the window inside a block. With ``shift`` the row before
    the block comes along in every forward.
    """

    def __init__(self, config: ModelConfig, mask: int, *, length: int):
        self._mask, self._length = mask, length
        self._block, self._shift = config.block_size, int(config.shift)
        self._limit = config.max_position_embeddings

    def open(self, seq: Sequence) -> Canvas:
        n = seq.prompt_len
        base = n // self._block * self._block
        canvas = Canvas(list(seq.tokens), self._mask, n + seq.params.max_tokens, base=base)
        self._extend(canvas)
        start = base + (n - base) // self._length * self._length
        canvas.enter(start, min(start + self._length, len(canvas.ids)))
        return canvas

    def slots(self, seq: Sequence) -> int:
        return seq.prompt_len + seq.params.max_tokens + self._block + 1

    def prefill(self, seq: Sequence, canvas: Canvas) -> int:
        """Whole blocks; the last one before the unfinished block comes with the step itself."""
        return canvas.base if len(seq.view) >= canvas.base else max(0, canvas.base - self._block)

    def step(self, seq: Sequence, canvas: Canvas) -> Step:
        base, stop = canvas.base, len(canvas.ids)
        clean = base - seq.computed  # rows of the finished block: B or none
        context = None
        if self._shift and base and not clean:
            context, clean = [(0, base - 1)], 1
            keep: Seq[int] = ()
        else:
            keep = range(clean)
        start = base - clean
        n = stop - start
        see: str | np.ndarray = FULL
        if clean:
            see = np.ones((n, n), bool)
            see[:clean, clean:] = False
        asked = canvas.masked()
        return Step(
            canvas.ids[start:stop], range(start, stop), see, context,
            logits=[i - self._shift - start for i in asked], extra=Ask(asked, keep=keep),
        )

    def kept(self, seq: Sequence, canvas: Canvas, step: Step) -> dict[str, Any]:
        return {"keep": step.extra.keep}

    def advance(self, seq: Sequence, canvas: Canvas) -> None:
        if canvas.stop >= canvas.end:
            return
        if canvas.stop == len(canvas.ids):
            canvas.base = canvas.stop
            self._extend(canvas)
        canvas.enter(canvas.stop, min(canvas.stop + self._length, len(canvas.ids)))

    def _extend(self, canvas: Canvas) -> None:
        """Masks up to the end of the block at ``base``, or of the positions the model knows."""
        stop = min(canvas.base + self._block, self._limit)
        canvas.ids += [self._mask] * (stop - len(canvas.ids))
