"""Masked diffusion decoding: every forward decides as many masked positions as the rule trusts.

A forward gives each masked position of the window a candidate token and a score (unmask.py); a rule
picks those that become final; the canvas (canvas.py) says which rows come next. Tokens reach the
engine as the decided part grows from the left; behind a final end-of-text nothing is decided any
more. Sources: LLaDA, Dream, Fast-dLLM 1 and 2, SDAR, dInfer, EB-Sampler, CD4LM.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from stretto.decoding.canvas import BlockCanvas, Canvas, FullCanvas
from stretto.decoding.options import option
from stretto.decoding.unmask import DIALS, Candidates, Credit, candidates, quota, score, select
from stretto.engine.host import Host
from stretto.engine.sampling import noise
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.errors import CapacityError, OptionError, PromptError, UnsupportedError

__all__ = ["Diffusion", "Options"]

DRAW, ORDER = 1, 2  # uses of the noise of one forward: candidates, and the random order


@dataclass(frozen=True, kw_only=True)
class Options:
    """``unmask`` picks positions and ``threshold`` is its dial; ``score`` orders them; ``cache``
    trades exactness for rows."""

    unmask: str = option(
        "threshold", "rule that picks the positions a forward decides",
        choices=("threshold", "fixed", "factor", "entropy", "eb", "dynamic", "hierarchy"),
    )
    threshold: float | None = option(
        None, "dial of the rule: tau (threshold, dynamic, hierarchy: 0.9; above 1 = one token a "
        "forward), f (factor: 1), nats (entropy: 0.45), gamma (eb: 0.1)", low=0.0,
    )
    score: str = option(
        "confidence", "which position comes first",
        choices=("confidence", "margin", "neg_entropy", "random", "position"),
    )
    steps: int | None = option(
        None, "S: forwards a block (fixed, dynamic); none = one token a forward", low=1,
    )
    block_length: int | None = option(
        None, "tokens decoded before the next block is begun; none = 32, or the block of a "
        "block-causal model", low=1,
    )
    cache: str = option(
        "auto", "K/V of a full-attention model: none is exact, prefix and dual approximate; auto = "
        "prefix. Block-causal models have the exact block cache",
        choices=("auto", "none", "prefix", "dual", "block"),
    )
    refresh: int = option(
        0, "forwards between refreshes of the prefix or dual cache; 0 = once a block", low=0,
    )
    vicinity: int = option(
        0, "tokens around the block that the dual cache evaluates too (dInfer: 16)", low=0,
    )
    low: float = option(
        0.6, "hierarchy: the least confidence for the best of a run", low=0.0, high=1.0,
    )
    credit: float = option(
        0.0, "alpha of the credit for tokens that led before (dInfer: 0.7); 0 = off", low=0.0,
    )
    eos_policy: str = option(
        "none", "end-of-text: suppress = never; confidence_zero = only when nothing else is left; "
        "min_progress = not before eos_progress",
        choices=("none", "suppress", "confidence_zero", "min_progress"),
    )
    eos_progress: float = option(
        0.3, "share of max_tokens to be decided before an end-of-text (min_progress)",
        low=0.0, high=1.0,
    )
    infill: bool = option(False, "fill mask tokens inside the prompt too (full attention)")


class Diffusion:
    """Masked diffusion: several tokens per forward, in any order, for models trained so."""

    name = "diffusion"
    lossless = False
    kinds = ("full", "block")
    grammar = False

    def __init__(self, host: Host, options: Options):
        config = host.config
        if config.attention not in self.kinds:
            raise UnsupportedError(
                "method 'diffusion' needs a masked diffusion model (full or block attention); this "
                f"one has {config.attention!r} attention: use method 'ar'"
            )
        if config.mask_token_id is None:
            raise UnsupportedError(
                "method 'diffusion' needs a mask token, and the model's config.json has no "
                "mask_token_id: add it"
            )
        check(options, config.attention, config.block_size)
        self._host, self._options, self._mask = host, options, config.mask_token_id
        self._stops = np.array(host.stop_ids, np.int64)
        rule = options.unmask
        self._dial = DIALS.get(rule, 0.0) if options.threshold is None else options.threshold
        self._wants = {
            "margin": options.score == "margin",
            "entropy": options.score == "neg_entropy" or rule in ("entropy", "eb"),
        }
        length = options.block_length or (config.block_size if config.attention == "block" else 32)
        if config.attention == "block":
            self._rows: BlockCanvas | FullCanvas = BlockCanvas(config, self._mask, length=length)
        else:
            self._rows = FullCanvas(
                config, self._mask, length=length,
                cache="prefix" if options.cache == "auto" else options.cache,
                refresh=options.refresh, vicinity=options.vicinity,
            )

    def admit(self, seq: Sequence) -> None:
        if self._mask in seq.tokens and not self._options.infill:
            raise PromptError(
                f"the prompt holds the mask token {self._mask} at position "
                f"{seq.tokens.index(self._mask)}: take it out, or set infill=true to have it "
                "filled in (full-attention models)"
            )
        need, total = self._rows.slots(seq), self._host.runner.alloc.total
        if need > total:
            raise CapacityError(
                f"diffusion may need {need} cache slots for this request, the pool has {total}: "
                "raise kv_cache_tokens, lower max_tokens, or use cache=none"
            )
        seq.state = self._rows.open(seq)
        seq.state.credit = Credit(self._options.credit) if self._options.credit else None

    def prefill(self, seq: Sequence) -> int:
        return self._rows.prefill(seq, seq.state)

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        return [self._rows.step(seq, seq.state) for seq in seqs]

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        asked = [step.extra.positions for step in steps]
        ends = np.cumsum([0, *map(len, asked)]).tolist()
        spans = [slice(a, b) for a, b in pairwise(ends)]
        laws = torch.cat([o.logits for o in outcomes])
        laws[:, self._mask] = -torch.inf
        raw = [
            laws[s].clone() if seq.logprobs is not None else None
            for seq, s in zip(seqs, spans, strict=True)
        ]
        self._process(seqs, asked, laws, spans)
        found = self._candidates(seqs, asked, laws, spans, [o.argmax for o in outcomes])
        out = []
        for seq, step, c, law in zip(seqs, steps, found, raw, strict=True):
            self._decide(seq, step.extra.positions, c, law)
            out.append(self._commit(seq, step))
        return out

    def release(self, seq: Sequence) -> None:
        seq.state = None

    def preemptible(self, seq: Sequence) -> bool:
        """Always without effect on the result; of no use while nothing is cached."""
        return len(seq.view) > 0

    def _process(
        self, seqs: list[Sequence], asked: list[list[int]], laws: Tensor, spans: list[slice]
    ) -> None:
        """End-of-text policy, penalties, bias, minimum length, credit: on all ``laws``, in
        place."""
        if self._options.eos_policy == "suppress":
            laws[:, self._stops] = -torch.inf
        for seq, positions, s in zip(seqs, asked, spans, strict=True):
            if processed(seq):
                rest = [t for t in seq.state.ids[len(seq.tokens) :] if t != self._mask]
                for row, at in zip(laws[s], positions, strict=True):
                    row.copy_(seq.sampler.process(row, at - seq.prompt_len, rest))
            if seq.state.credit is not None:
                seq.state.credit.fuse(laws[s], positions)

    def _candidates(
        self, seqs: list[Sequence], asked: list[list[int]], laws: Tensor, spans: list[slice],
        best: list[np.ndarray],
    ) -> list[Candidates]:
        """One batch of torch operations for all sequences of the same sampling parameters."""
        groups: dict[tuple, list[int]] = {}
        for i, seq in enumerate(seqs):
            groups.setdefault(kind(seq), []).append(i)
        out: dict[int, Candidates] = {}
        for key, members in groups.items():
            rows = laws
            if len(members) < len(seqs):
                rows = torch.cat([laws[spans[i]] for i in members])
            uniform = known = None
            if key[0]:
                uniform = np.concatenate([uniforms(seqs[i], asked[i], DRAW) for i in members])
            elif not key[-1] and not self._options.credit:
                known = np.concatenate([best[i] for i in members])
            c = candidates(rows, seqs[members[0]].params, uniform, best=known, **self._wants)
            at = 0
            for i in members:
                out[i] = c.part(at, at + len(asked[i]))
                at += len(asked[i])
        return [out[i] for i in range(len(seqs))]

    def _decide(
        self, seq: Sequence, positions: list[int], c: Candidates, law: Tensor | None
    ) -> None:
        """Write what this forward decides onto the canvas."""
        o, canvas = self._options, seq.state
        is_stop = (c.tokens[:, None] == self._stops).any(1)
        if o.eos_policy in ("confidence_zero", "min_progress") and is_stop.any():
            done = sum(i >= seq.prompt_len for i in canvas.decided)
            if o.eos_policy == "confidence_zero" or done < o.eos_progress * seq.params.max_tokens:
                c = c.held_back(is_stop)
        order = uniforms(seq, positions, ORDER) if o.score == "random" else None
        k = quota(canvas.count, o.steps, canvas.turn)
        chosen = select(
            o.unmask, c, score(o.score, c, order), positions, dial=self._dial, k=k, low=o.low
        )
        for i in np.flatnonzero(chosen).tolist():
            at, token = positions[i], int(c.tokens[i])
            ends = bool(is_stop[i]) and not seq.params.ignore_eos and at >= seq.prompt_len
            canvas.decide(at, token, seq.metrics.forwards, ends=ends)
            if law is not None:
                canvas.logprobs[at] = top_logprobs(law[i], token, seq.params.logprobs or 0)

    def _commit(self, seq: Sequence, step: Step) -> Commit:
        """Hand over what is decided without a gap; go to the next window when this one is done."""
        canvas: Canvas = seq.state
        canvas.turn += 1
        if not canvas.masked():
            self._rows.advance(seq, canvas)
        if canvas.start >= seq.prompt_len and self._options.infill:
            seq.tokens[: seq.prompt_len] = canvas.ids[: seq.prompt_len]
        final = list(self._final(canvas, len(seq.tokens)))
        commit = Commit(
            [canvas.ids[i] for i in final], step_map=[canvas.decided[i] for i in final],
            **self._rows.kept(seq, canvas, step),
        )
        if seq.logprobs is not None:
            commit.logprobs = [canvas.logprobs.pop(i) for i in final]
        return commit

    def _final(self, canvas: Canvas, start: int) -> Iterator[int]:
        for i in range(start, min(canvas.end, len(canvas.ids))):
            if canvas.ids[i] == self._mask:
                return
            yield i


def check(o: Options, attention: str, block: int) -> None:
    """Refuse options that the model cannot have, or that the chosen rule would ignore."""

    def refuse(name: str, allowed: str) -> None:
        raise OptionError(f"diffusion.{name}", getattr(o, name), allowed)

    if attention == "full":
        if o.cache == "block":
            refuse("cache", "auto, none, prefix or dual for a full-attention model")
    else:
        if o.cache not in ("auto", "block"):
            refuse("cache", "auto or block (exact) for a block-causal model")
        if o.block_length is not None and o.block_length > block:
            refuse("block_length", f"at most {block}, the block that the model was trained with")
        if o.infill:
            refuse("infill", "false: a block-causal model does not see what comes later")
    if o.steps is not None and o.unmask not in ("fixed", "dynamic"):
        refuse("steps", f"none with unmask={o.unmask}: only fixed and dynamic have steps")
    if o.threshold is not None and o.unmask == "fixed":
        refuse("threshold", "none with unmask=fixed: set steps")
    if o.refresh and (attention != "full" or o.cache == "none"):
        refuse("refresh", "0 without the prefix or dual cache")
    if o.vicinity and o.cache != "dual":
        refuse("vicinity", "0 unless cache=dual")


def processed(seq: Sequence) -> bool:
    """Whether the sampler changes logits before the temperature."""
    p = seq.params
    penalties = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
    return bool(penalties or p.logit_bias or p.min_tokens)


def kind(seq: Sequence) -> tuple:
    """Sequences of one kind are sampled in one batch: temperature, truncation, whether
    processed."""
    p = seq.params
    rest = (p.top_k, p.top_p, p.min_p) if p.temperature else ()
    return p.temperature, *rest, not p.temperature and processed(seq)


def uniforms(seq: Sequence, positions: list[int], use: int) -> np.ndarray:
    """float64 [n] in (0, 1): functions of seed, choice, number of the forward and position only."""
    return noise(seq.sampler.key, seq.metrics.forwards, use, positions[-1] + 1)[positions]


def top_logprobs(law: Tensor, token: int, k: int) -> dict[int, float]:
    """Log-probabilities of ``token`` and the k most likely ones under float [V] logits."""
    x = torch.log_softmax(law.double(), -1)
    top = torch.topk(x, k).indices.tolist() if k else []
    return {t: float(x[t]) for t in [token, *top]}
