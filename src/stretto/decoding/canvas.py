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
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from stretto.engine.types import FULL, Sequence, Step
from stretto.models.config import ModelConfig

__all__ = ["Ask", "BlockCanvas", "Branches", "Canvas", "FullCanvas"]


@dataclass(slots=True)
class Canvas:
    """One sequence as far as it is decided. ``ids`` holds the mask id wherever it is not."""

    ids: list[int]
    mask: int
    end: int  # nothing from here on is decided: max_tokens, or behind the first final end-of-text
    start: int = 0  # the window is [start, stop)
    stop: int = 0
    count: int = 0  # masks in the window when it was entered
    turn: int = 0  # steps of the rule spent on the window
    step: int = 0  # and on the whole text: numbers the noise
    base: int = 0  # first position of the unfinished block (block-causal models)
    decided: dict[int, int] = field(default_factory=dict)  # position -> number of the forward
    logprobs: dict[int, dict[int, float]] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)  # the canvas whose K/V is cached (full attention)
    credit: Any = None

    def masked(self) -> list[int]:
        """The positions of the window that are still to be decided."""
        return [i for i in range(self.start, min(self.stop, self.end)) if self.ids[i] == self.mask]

    def copy(self) -> Canvas:
        """A branch: what is decided on it leaves this one alone. Credit is not copied."""
        return replace(
            self, ids=list(self.ids), decided=dict(self.decided), logprobs=dict(self.logprobs)
        )

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


@dataclass(slots=True)
class Branches:
    """Step.extra of a step that evaluates several canvases at once: for each what ``Ask`` says,
    ``keep`` in rows of this step."""

    asks: list[Ask]
    canvases: list[Canvas] = field(default_factory=list)


def side_by_side(steps: Seq[Step], head: int) -> Step:
    """One step for several canvases of one sequence. The first ``head`` rows must be the same in all
    and see only each other: they stand once. No branch sees a row of another."""
    sizes = [len(s) - head for s in steps]
    ends = np.cumsum([head, *sizes]).tolist()
    see = np.zeros((ends[-1],) * 2, bool)
    tokens, positions = list(steps[0].tokens[:head]), _positions(steps[0])[:head]
    logits, asks = [], []
    for s, (a, b) in zip(steps, pairwise(ends), strict=True):
        own = np.ones((len(s),) * 2, bool) if isinstance(s.see, str) else np.asarray(s.see)
        see[:head, :head] = own[:head, :head]
        see[a:b, :head], see[a:b, a:b] = own[head:, :head], own[head:, head:]
        rows = [*range(head), *range(a, b)]
        tokens += s.tokens[head:]
        positions += _positions(s)[head:]
        logits += [rows[i] for i in s.logits or ()]
        asks.append(replace(s.extra, keep=[rows[i] for i in s.extra.keep]))
    context = steps[0].context
    return Step(tokens, positions, see, context, logits=logits, extra=Branches(asks))


def _positions(step: Step) -> list[int]:
    """Those of the rows; without any, the step is a whole canvas."""
    return list(range(len(step)) if step.positions is None else step.positions)


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

    def branches(self, seq: Sequence, canvases: Seq[Canvas]) -> Step:
        """Several canvases beside each other; all in the same window, unless nothing is cached."""
        steps = [self.step(seq, c) for c in canvases]
        again = self._cache != "none" and not len(seq.view) and steps[0].extra.whole is None
        return side_by_side(steps, len(canvases[0].ids) if again and canvases[0].seen else 0)

    def kept(self, seq: Sequence, canvas: Canvas, ask: Ask) -> dict[str, Any]:
        """What happens to the K/V, after ``advance``: fields of Commit."""
        if self._fresh(canvas):
            return {"truncate": 0}
        if ask.whole is None:
            return {}
        canvas.seen = ask.whole
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
        return self._step(canvas, *self._start(seq, canvas))

    def branches(self, seq: Sequence, canvases: Seq[Canvas]) -> Step:
        """Several canvases beside each other, which share the finished blocks of the first; later
        ones may have finished more."""
        start, context = self._start(seq, canvases[0])
        steps = [self._step(c, start, context) for c in canvases]
        return side_by_side(steps, canvases[0].base - start)

    def kept(self, seq: Sequence, canvas: Canvas, ask: Ask) -> dict[str, Any]:
        return {"keep": ask.keep}

    def _start(self, seq: Sequence, canvas: Canvas) -> tuple[int, list[tuple[int, int]] | None]:
        """First position that is evaluated, and the cached rows before it: None = all."""
        base = canvas.base
        if self._shift and base and base == seq.computed:
            return base - 1, [(0, base - 1)]
        return seq.computed, None

    def _step(self, canvas: Canvas, start: int, context: list[tuple[int, int]] | None) -> Step:
        """Finished blocks from ``start`` on, whose K/V stays, and the unfinished one."""
        stop, clean = len(canvas.ids), canvas.base - start
        see: str | np.ndarray = FULL
        if clean:
            block = np.arange(start, stop) // self._block
            see = block[None, :] <= block[:, None]
        asked = canvas.masked()
        return Step(
            canvas.ids[start:stop], range(start, stop), see, context,
            logits=[i - self._shift - start for i in asked],
            extra=Ask(asked, keep=range(0 if context is None else 1, clean)),
        )

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
