"""From the laws of masked positions to decisions: what every method that fills a canvas shares.

A *state* is a canvas that a forward evaluated. ``Denoiser.judge`` gives each masked position of all
states a candidate and its scores; ``Denoiser.decide`` writes onto a canvas what one step of the rule
makes final. Both are functions of the state, the laws and the number of the step, so that the same
step taken in another forward, beside other states, decides the same. Legend: n positions, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from stretto.decoding.canvas import BlockCanvas, Canvas, FullCanvas
from stretto.decoding.filter import Filter
from stretto.decoding.unmask import (
    DIALS,
    Candidates,
    candidates,
    quota,
    score,
    select,
    take_best,
)
from stretto.engine.host import Host
from stretto.engine.sampling import noise
from stretto.engine.types import Outcome, Sequence
from stretto.errors import CapacityError, UnsupportedError
from stretto.models.config import ModelConfig

__all__ = [
    "Denoiser", "State", "check_room", "final_tokens", "gather", "mask_of", "open_rows", "processed", "top_logprobs",
    "uniforms",
]

DRAW, ORDER = 1, 2  # uses of the noise of one step: candidates, and the random order


@dataclass(slots=True)
class State:
    """``positions`` [n] of ``canvas`` are masked and have a law."""

    seq: Sequence
    canvas: Canvas
    positions: list[int]


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """The rule of one step. ``dial`` None: the rule's own default. ``stops``: ids that end a text.
    ``least``, ``most``: bounds of what one step takes (cad). ``filter``: of rule "filter".
    ``reference``: the text of rule "oracle". ``after_end``: what becomes of positions behind a final
    end-of-text. ``observe`` sees every state, its candidates and what was chosen."""

    mask: int
    stops: Seq[int]
    unmask: str = "threshold"
    dial: float | None = None
    score: str = "confidence"
    steps: int | None = None
    low: float = 0.6
    eos_policy: str = "none"
    eos_progress: float = 0.3
    least: int = 1
    most: int | None = None
    filter: Filter | None = None
    reference: Seq[int] = ()
    after_end: str = "stop"
    observe: Callable[[State, Candidates, np.ndarray], None] | None = None

    def judge(
        self, states: Seq[State], laws: Tensor, best: np.ndarray
    ) -> tuple[list[Candidates], list[Tensor | None]]:
        """Candidates of every state, and its laws before processing where log-probabilities are
        wanted. ``laws`` float [all positions of all states, V] is changed in place; ``best``: their
        argmax."""
        ends = np.cumsum([0, *(len(s.positions) for s in states)]).tolist()
        spans = [slice(a, b) for a, b in pairwise(ends)]
        laws[:, self.mask] = -torch.inf
        raw = [
            laws[span].clone() if s.seq.logprobs is not None else None
            for s, span in zip(states, spans, strict=True)
        ]
        self._process(states, laws, spans)
        return self._candidates(states, laws, spans, best), raw

    def decide(self, state: State, c: Candidates, law: Tensor | None) -> np.ndarray:
        """Write what this step makes final onto the state's canvas; bool [n]: which positions."""
        seq, canvas, positions = state.seq, state.canvas, state.positions
        is_stop = (c.tokens[:, None] == np.asarray(self.stops, np.int64)).any(1)
        if self.eos_policy in ("confidence_zero", "min_progress") and is_stop.any():
            done = sum(i >= seq.prompt_len for i in canvas.decided)
            share = done / seq.params.max_tokens
            if self.eos_policy == "confidence_zero" or share < self.eos_progress:
                c = c.held_back(is_stop)
        if self.unmask == "oracle":
            c, chosen = self._known(state, c)
        else:
            chosen = self._choose(state, c)
        if self.observe is not None:
            self.observe(state, c, chosen)
        for i in np.flatnonzero(chosen).tolist():
            token = int(c.tokens[i])
            self.put(seq, canvas, positions[i], token)
            if law is not None:
                canvas.logprobs[positions[i]] = top_logprobs(law[i], token, seq.params.logprobs or 0)
        canvas.turn, canvas.step = canvas.turn + 1, canvas.step + 1
        return chosen

    def put(self, seq: Sequence, canvas: Canvas, position: int, token: int) -> None:
        """Write one token onto a canvas, and what follows where it ends the text."""
        forward = seq.metrics.forwards
        ends = token in self.stops and not seq.params.ignore_eos and position >= seq.prompt_len
        canvas.decide(position, token, forward, ends=ends and self.after_end != "none")
        if ends and self.after_end == "fill":
            for i in range(position + 1, len(canvas.ids)):
                if canvas.ids[i] == self.mask:
                    canvas.ids[i] = token

    def order(self, state: State, c: Candidates) -> np.ndarray:
        """float64 [n]: the scores by which this step orders the positions."""
        uniform = None
        if self.score == "random":
            uniform = _uniforms(state, ORDER)
        return score(self.score, c, uniform)

    def _choose(self, state: State, c: Candidates) -> np.ndarray:
        canvas = state.canvas
        final, dial = None, DIALS.get(self.unmask, 0.0) if self.dial is None else self.dial
        if self.filter is not None:
            final = self.filter.final(c, state.positions, canvas.start)
            dial = self.filter.threshold if self.dial is None else self.dial
        return select(
            self.unmask, c, self.order(state, c), state.positions, dial=dial,
            k=quota(canvas.count, self.steps, canvas.turn), low=self.low, least=self.least,
            most=self.most, final=final,
        )

    def _known(self, state: State, c: Candidates) -> tuple[Candidates, np.ndarray]:
        """Extremely greedy parallel decoding: all candidates that equal the reference; where none
        does, the most confident position gets the reference's token."""
        at = np.asarray(state.positions) - state.seq.prompt_len
        text = np.asarray(self.reference, np.int64)
        known = at < len(text)
        right = np.full(len(at), self.stops[0] if self.stops else 0, np.int64)
        right[known] = text[at[known]]
        chosen = c.tokens == right
        if chosen.any():
            return c, chosen
        chosen = take_best(c.confidence, 1)
        return replace(c, tokens=np.where(chosen, right, c.tokens)), chosen

    def _process(self, states: Seq[State], laws: Tensor, spans: Seq[slice]) -> None:
        """End-of-text policy, penalties, bias, minimum length, credit: on all ``laws``, in
        place."""
        if self.eos_policy == "suppress":
            laws[:, list(self.stops)] = -torch.inf
        for s, span in zip(states, spans, strict=True):
            seq = s.seq
            if processed(seq):
                rest = [t for t in s.canvas.ids[len(seq.tokens) :] if t != self.mask]
                for row, at in zip(laws[span], s.positions, strict=True):
                    row.copy_(seq.sampler.process(row, at - seq.prompt_len, rest))
            if s.canvas.credit is not None:
                s.canvas.credit.fuse(laws[span], s.positions)

    def _candidates(
        self, states: Seq[State], laws: Tensor, spans: Seq[slice], best: np.ndarray
    ) -> list[Candidates]:
        """One batch of torch operations for all states of the same sampling parameters."""
        groups: dict[tuple, list[int]] = {}
        for i, s in enumerate(states):
            groups.setdefault(_kind(s), []).append(i)
        wants = {
            "margin": self.score == "margin",
            "entropy": self.score == "neg_entropy" or self.unmask in ("entropy", "eb"),
        }
        wants = {
            k: v or (self.filter is not None and k in self.filter.inputs) for k, v in wants.items()
        }
        out: dict[int, Candidates] = {}
        for key, members in groups.items():
            one = len(members) == len(states)
            rows = laws if one else torch.cat([laws[spans[i]] for i in members])
            uniform = known = None
            if key[0]:
                uniform = np.concatenate([_uniforms(states[i], DRAW) for i in members])
            elif not key[-1]:
                known = best if one else np.concatenate([best[spans[i]] for i in members])
            c = candidates(rows, states[members[0]].seq.params, uniform, best=known, **wants)
            at = 0
            for i in members:
                out[i] = c.part(at, at + len(states[i].positions))
                at += len(states[i].positions)
        return [out[i] for i in range(len(states))]


def mask_of(host: Host, method: str) -> int:
    """The mask id of the model; UnsupportedError where ``method`` cannot run."""
    config = host.config
    if config.attention not in ("full", "block"):
        raise UnsupportedError(
            f"method {method!r} needs a masked diffusion model (full or block attention); this one "
            f"has {config.attention!r} attention: use method 'ar'"
        )
    if config.mask_token_id is None:
        raise UnsupportedError(
            f"method {method!r} needs a mask token, and the model's config.json has no "
            "mask_token_id: add it"
        )
    return config.mask_token_id


def open_rows(
    config: ModelConfig, mask: int, *, block_length: int | None, cache: str, refresh: int = 0,
    vicinity: int = 0,
) -> BlockCanvas | FullCanvas:
    """What decides which rows a forward evaluates, for the model's kind of attention."""
    if config.attention == "block":
        return BlockCanvas(config, mask, length=block_length or config.block_size)
    return FullCanvas(
        config, mask, length=block_length or 32, cache="prefix" if cache == "auto" else cache,
        refresh=refresh, vicinity=vicinity,
    )


def check_room(host: Host, method: str, need: int) -> None:
    """CapacityError when a request may need more cache slots than there are."""
    total = host.runner.alloc.total
    if need > total:
        raise CapacityError(
            f"{method} may need {need} cache slots for this request, the pool has {total}: "
            "raise kv_cache_tokens, lower max_tokens, or use cache=none"
        )


def gather(outcomes: Seq[Outcome]) -> tuple[Tensor, np.ndarray]:
    """The laws of several outcomes, one after the other (a copy), and their argmax."""
    return torch.cat([o.logits for o in outcomes]), np.concatenate([o.argmax for o in outcomes])


def final_tokens(canvas: Canvas, start: int) -> list[int]:
    """Positions from ``start`` on that are decided without a gap, up to the end of the text."""
    stop = min(canvas.end, len(canvas.ids))
    gap = (i for i in range(start, stop) if canvas.ids[i] == canvas.mask)
    return list(range(start, next(gap, stop)))


def processed(seq: Sequence) -> bool:
    """Whether the sampler changes logits before the temperature."""
    p = seq.params
    penalties = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
    return bool(penalties or p.logit_bias or p.min_tokens)


def _kind(state: State) -> tuple:
    """States of one kind are sampled in one batch: temperature, truncation, whether the logits
    were changed."""
    p = state.seq.params
    rest = (p.top_k, p.top_p, p.min_p) if p.temperature else ()
    changed = processed(state.seq) or state.canvas.credit is not None
    return p.temperature, *rest, not p.temperature and changed


def _uniforms(state: State, use: int) -> np.ndarray:
    return uniforms(state.seq, state.canvas.step, state.positions, use)


def uniforms(seq: Sequence, step: int, positions: list[int], use: int) -> np.ndarray:
    """float64 [n] in (0, 1): functions of seed, choice, number of the step and position only."""
    return noise(seq.sampler.key, step, use, positions[-1] + 1)[positions]


def top_logprobs(law: Tensor, token: int, k: int) -> dict[int, float]:
    """Log-probabilities of ``token`` and the k most likely ones under float [V] logits."""
    x = torch.log_softmax(law.double(), -1)
    top = torch.topk(x, k).indices.tolist() if k else []
    return {t: float(x[t]) for t in [token, *top]}
