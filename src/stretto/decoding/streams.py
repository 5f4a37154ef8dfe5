"""Parallel streams of one answer (NAP, arXiv 2602.23225): regions of a diffusion canvas grow in every forward.

The canvas is laid out beforehand: m streams of the same length, each between its tags, and a summary behind them. A
forward decides k tokens: every unfinished stream gets its share (macro-parallel), and inside a stream the most
confident masks are taken (micro-confidence). The summary begins when all streams are finished. Every forward evaluates
the whole canvas, so nothing cached is approximate.

Layouts: "shared", all streams see each other (as published); "isolated", a stream sees the prompt and itself, the
summary sees everything: a stream's tokens are then those of the stream alone.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch

from stretto.decoding.denoise import DRAW, processed, top_logprobs, uniforms
from stretto.decoding.options import option
from stretto.decoding.unmask import Candidates, candidates
from stretto.engine.host import Host
from stretto.engine.types import FULL, Commit, Outcome, Sequence, Step
from stretto.errors import OptionError, PromptError, UnsupportedError

__all__ = ["Options", "Streams", "quotas"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The canvas has exactly max_tokens places, tags included; what the streams leave is the summary's."""

    streams: int = option(3, "m: paths that grow together", low=1, high=64)
    stream_length: int | None = option(
        None, "l: places of a stream between its tags; none = three quarters of max_tokens over all streams", low=1,
    )
    tokens_per_step: int = option(3, "k: tokens that a forward decides over all unfinished streams", low=1)
    layout: str = option("shared", "who sees whom", choices=("shared", "isolated"))
    open: int | None = option(None, "id of the tag before a stream; none = no tag", low=0)
    close: int | None = option(None, "id of the tag behind a stream, which also ends it early; none = no tag", low=0)
    summary: int | None = option(None, "id of the tag before the summary; none = no tag", low=0)


@dataclass(slots=True)
class _Canvas:
    """``ids`` of prompt and answer, the mask id where undecided. ``regions``: [start, stop) of the masks of each
    stream, the summary last; ``closed``: places behind an early end, which are not handed out."""

    ids: list[int]
    regions: list[tuple[int, int]]
    decided: dict[int, int]
    closed: set[int] = field(default_factory=set)
    end: int = 0
    out: int = 0  # the first place that is not handed out yet
    turn: int = 0
    logprobs: dict[int, dict[int, float]] = field(default_factory=dict)


class Streams:
    """Several independent paths and a summary in one answer, all growing in every forward (NAP)."""

    name = "streams"
    lossless = False
    aliases = ("nap",)
    kinds = ("full",)
    grammar = False

    def __init__(self, host: Host, options: Options):
        c = host.config
        if c.attention not in self.kinds or c.mask_token_id is None:
            raise UnsupportedError(
                "method 'streams' needs a masked diffusion model with full attention and a mask_token_id; this one has "
                f"{c.attention!r} attention"
            )
        for name in ("open", "close", "summary"):
            tag = getattr(options, name)
            if tag is not None and tag >= host.runner.vocabulary:
                raise OptionError(f"streams.{name}", tag, f"a token id below {host.runner.vocabulary}")
        self._o, self._mask, self._shift = options, c.mask_token_id, int(c.shift)
        self._stops = frozenset(host.stop_ids)

    def admit(self, seq: Sequence) -> None:
        if self._mask in seq.tokens:
            raise PromptError(f"the prompt holds the mask token {self._mask}: take it out")
        seq.state = self._lay_out(seq)

    def prefill(self, seq: Sequence) -> int:
        return 0

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        steps = []
        for seq in seqs:
            canvas = seq.state
            asked = self._asked(canvas)
            rows = [max(0, i - self._shift) for i in asked]
            see = FULL if self._o.layout == "shared" else self._isolated(seq, canvas)
            steps.append(Step(list(canvas.ids), range(len(canvas.ids)), see, logits=rows, extra=asked))
        return steps

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        return [self._commit(*item) for item in zip(seqs, steps, outcomes, strict=True)]

    def release(self, seq: Sequence) -> None:
        seq.state = None

    def preemptible(self, seq: Sequence) -> bool:
        """Nothing is cached, so there is nothing to give back."""
        return False

    def _lay_out(self, seq: Sequence) -> _Canvas:
        """Tags and masks; as many streams as max_tokens has room for, at most m."""
        o, n = self._o, seq.params.max_tokens
        tags = (o.open is not None) + (o.close is not None)
        length, summary = o.stream_length, int(o.summary is not None)
        if length is None:
            length = max(1, (3 * n // 4) // o.streams - tags)
        elif o.streams * (length + tags) + summary > n:
            most = (n - summary) // o.streams - tags
            raise OptionError(
                "streams.stream_length", length,
                f"at most {most} for {o.streams} streams in max_tokens={n}, or fewer streams",
            )
        ids, regions, decided = list(seq.tokens), [], {}
        for _ in range(min(o.streams, (n - summary) // (length + tags))):
            if o.open is not None:
                ids.append(o.open)
            regions.append((len(ids), len(ids) + length))
            ids += [self._mask] * length
            if o.close is not None:
                ids.append(o.close)
        if o.summary is not None and len(ids) < seq.prompt_len + n:
            ids.append(o.summary)
        end = seq.prompt_len + n
        regions.append((len(ids), end))
        ids += [self._mask] * (end - len(ids))
        decided = {i: 0 for i in range(seq.prompt_len, end) if ids[i] != self._mask}
        return _Canvas(ids, regions, decided, end=end, out=seq.prompt_len)

    def _open_regions(self, canvas: _Canvas) -> list[list[int]]:
        """The masked places of each unfinished stream; of the summary when all are finished."""
        left = [
            [i for i in range(a, min(b, canvas.end)) if canvas.ids[i] == self._mask and i not in canvas.closed]
            for a, b in canvas.regions
        ]
        return [x for x in left[:-1] if x] or [left[-1]]

    def _asked(self, canvas: _Canvas) -> list[int]:
        return [i for region in self._open_regions(canvas) for i in region]

    def _isolated(self, seq: Sequence, canvas: _Canvas) -> np.ndarray:
        """bool [n, n]: the prompt sees itself, a stream (with its tags) the prompt and itself, the summary all."""
        owner = np.zeros(len(canvas.ids), np.int32)
        for number, (a, b) in enumerate(canvas.regions, 1):
            last = number == len(canvas.regions)
            start = a - ((self._o.summary if last else self._o.open) is not None and a > seq.prompt_len)
            owner[start : b if last or self._o.close is None else b + 1] = number
        top = len(canvas.regions)
        of, at = owner[:, None], owner[None, :]
        return (at == 0) | (of == at) | (of == top)

    def _commit(self, seq: Sequence, step: Step, outcome: Outcome) -> Commit:
        canvas, asked = seq.state, step.extra
        laws = outcome.logits.clone()
        laws[:, self._mask] = -torch.inf
        raw = laws.clone() if seq.logprobs is not None else None
        if processed(seq):
            rest = [t for t in canvas.ids[seq.prompt_len :] if t != self._mask]
            for row, at in zip(laws, asked, strict=True):
                row.copy_(seq.sampler.process(row, at - seq.prompt_len, rest))
        uniform = uniforms(seq, canvas.turn, asked, DRAW) if seq.params.temperature else None
        c = candidates(laws, seq.params, uniform)
        for i in self._chosen(canvas, asked, c):
            self._decide(seq, canvas, asked[i], int(c.tokens[i]))
            if raw is not None:
                canvas.logprobs[asked[i]] = top_logprobs(raw[i], int(c.tokens[i]), seq.params.logprobs or 0)
        canvas.turn += 1
        return self._hand_out(seq, canvas)

    def _chosen(self, canvas: _Canvas, asked: list[int], c: Candidates) -> list[int]:
        """Indices into ``asked``: each region's share of its most confident masks."""
        out, start = [], 0
        sizes = [len(r) for r in self._open_regions(canvas)]
        shares = quotas(self._o.tokens_per_step, len(sizes), canvas.turn)
        for size, share in zip(sizes, shares, strict=True):
            order = np.argsort(-c.confidence[start : start + size], kind="stable")[:share]
            out += [start + int(i) for i in order]
            start += size
        return out

    def _decide(self, seq: Sequence, canvas: _Canvas, at: int, token: int) -> None:
        """Write a token; a closing tag ends its stream, an end-of-text the summary."""
        if at in canvas.closed or at >= canvas.end:
            return
        canvas.ids[at], canvas.decided[at] = token, seq.metrics.forwards
        if seq.params.ignore_eos:
            return
        stop = next(b for a, b in canvas.regions if a <= at < b)
        if stop == canvas.regions[-1][1]:
            if token in self._stops:
                canvas.end = min(canvas.end, at + 1)
        elif token == self._o.close or token in self._stops:
            fill = token if self._o.close is None else self._o.close
            for i in range(at, stop):
                canvas.ids[i] = fill
                canvas.closed.add(i)

    def _hand_out(self, seq: Sequence, canvas: _Canvas) -> Commit:
        """What is decided without a gap from the left; the closed ends of streams are left out."""
        tokens, steps, laws = [], [], []
        while canvas.out < canvas.end and canvas.ids[canvas.out] != self._mask:
            at = canvas.out
            canvas.out += 1
            if at not in canvas.closed:
                tokens.append(canvas.ids[at])
                steps.append(canvas.decided[at])
                laws.append(canvas.logprobs.pop(at, {canvas.ids[at]: 0.0}))
        done = canvas.out == canvas.end and (not tokens or len(seq.tokens) + len(tokens) < canvas.end)
        return Commit(
            tokens, truncate=0, step_map=steps, logprobs=laws if seq.logprobs is not None else None,
            finished="stop" if done and not seq.params.ignore_eos else None,
        )


def quotas(k: int, streams: int, turn: int) -> Seq[int]:
    """How many of ``k`` tokens each of the unfinished ``streams`` gets: equal shares, the rest in turns."""
    base, rest = divmod(k, streams)
    return [base + ((i - turn) % streams < rest) for i in range(streams)]
