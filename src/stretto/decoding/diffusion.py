"""Masked diffusion decoding: every forward decides as many masked positions as the rule trusts.

A forward gives each masked position of the window a candidate token and a score (unmask.py); a rule
picks those that become final; the canvas (canvas.py) says which rows come next. Tokens reach the
engine as the decided part grows from the left; behind a final end-of-text nothing is decided any
more. Sources: LLaDA, Dream, Fast-dLLM 1 and 2, SDAR, dInfer, EB-Sampler, CD4LM.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from stretto.decoding.canvas import Canvas
from stretto.decoding.denoise import (
    Denoiser,
    State,
    check_room,
    final_tokens,
    gather,
    mask_of,
    open_rows,
)
from stretto.decoding.filter import KIND, Filter
from stretto.decoding.options import option
from stretto.decoding.unmask import Credit
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.errors import OptionError, PromptError
from stretto.experts.sharing import sharing_rule

__all__ = ["Diffusion", "Options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """``unmask`` picks positions and ``threshold`` is its dial; ``score`` orders them; ``cache``
    trades exactness for rows."""

    unmask: str = option(
        "threshold", "rule that picks the positions a forward decides",
        choices=(
            "threshold", "fixed", "factor", "entropy", "eb", "dynamic", "hierarchy", "cad", "filter",
            "oracle",
        ),
    )
    threshold: float | None = option(
        None, "dial of the rule: tau (threshold, dynamic, hierarchy: 0.9; above 1 = one token a "
        "forward), f (factor: 1), nats (entropy: 0.45), gamma (eb: 0.1), tau of cad (0.95), the "
        "probability of a filter (none = its own)", low=0.0,
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
    least: int = option(1, "cad: k_min, tokens a forward decides at least", low=1)
    most: int | None = option(32, "cad: k_max, tokens a forward decides at most", low=1)
    filter: str = option("auto", "filter: the adapter of kind learn2pd (auto, zoo:NAME, a folder)")
    reference: str | None = option(
        None, "oracle: token ids of the text to reproduce, separated by commas; everything that is "
        "predicted right is decided: an upper bound for measurements",
    )
    eos_policy: str = option(
        "auto", "end-of-text: suppress = never; confidence_zero = only when nothing else is left; "
        "min_progress = not before eos_progress; auto = min_progress with cad, else none",
        choices=("auto", "none", "suppress", "confidence_zero", "min_progress"),
    )
    eos_progress: float = option(
        0.3, "share of max_tokens to be decided before an end-of-text (min_progress)",
        low=0.0, high=1.0,
    )
    moe_sharing: str = option(
        "off", "mixture of experts: the rows of a block share a set of experts (DES): seq = those "
        "that some row ranks highest, vote = those with most of the routers' weight",
        choices=("off", "seq", "vote"),
    )
    moe_budget: int | None = option(
        None, "experts that every row keeps (seq; none = half), or in the set (vote; none = 45 % of "
        "those chosen)", low=1,
    )
    moe_scope: str = option(
        "sequence", "who shares: the rows of one block, or of all sequences of a forward (a result "
        "then depends on its batch mates)", choices=("sequence", "batch"),
    )
    after_end: str = option(
        "stop", "behind a final end-of-text: stop = nothing is decided (exact); fill = the canvas is "
        "filled with it (Learn2PD as published); none = decoded too, as public code does",
        choices=("stop", "fill", "none"),
    )
    moe_commit: bool = option(
        False, "the pass that caches a finished block shares with the next one too: fewer experts, "
        "and its K/V is then approximate",
    )
    infill: bool = option(False, "fill mask tokens inside the prompt too (full attention)")


class Diffusion:
    """Masked diffusion: several tokens per forward, in any order, for models trained so."""

    name = "diffusion"
    lossless = False
    kinds = ("full", "block")
    grammar = False

    def __init__(self, host: Host, options: Options):
        config, self._mask = host.config, mask_of(host, self.name)
        check(options, config.attention, config.block_size)
        self._host, self._options = host, options
        self._sharing = sharing_rule(
            options.moe_sharing, config.moe, options.moe_budget, options.moe_scope
        )
        policy = "min_progress" if options.unmask == "cad" else "none"
        self.denoiser = Denoiser(
            mask=self._mask, stops=host.stop_ids, unmask=options.unmask, dial=options.threshold,
            score=options.score, steps=options.steps, low=options.low,
            eos_policy=policy if options.eos_policy == "auto" else options.eos_policy,
            eos_progress=options.eos_progress, least=options.least, most=options.most,
            filter=open_filter(host, options), reference=parse_ids(options.reference),
            after_end=options.after_end,
        )
        self._rows = open_rows(
            config, self._mask, block_length=options.block_length, cache=options.cache,
            refresh=options.refresh, vicinity=options.vicinity,
        )

    def admit(self, seq: Sequence) -> None:
        if self._mask in seq.tokens and not self._options.infill:
            raise PromptError(
                f"the prompt holds the mask token {self._mask} at position "
                f"{seq.tokens.index(self._mask)}: take it out, or set infill=true to have it "
                "filled in (full-attention models)"
            )
        check_room(self._host, self.name, self._rows.slots(seq))
        seq.state = self._rows.open(seq)
        seq.state.credit = Credit(self._options.credit) if self._options.credit else None

    def prefill(self, seq: Sequence) -> int:
        return self._rows.prefill(seq, seq.state)

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        steps = [self._rows.step(seq, seq.state) for seq in seqs]
        if self._sharing is not None:
            for seq, step in zip(seqs, steps, strict=True):
                canvas, block = seq.state, self._host.config.attention == "block"
                first = canvas.base - self._host.config.block_size * self._options.moe_commit
                span = (first, len(canvas.ids)) if block else (canvas.start, canvas.stop)
                step.sharing = self._sharing, block_rows(step, *span)
        return steps

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        states = [
            State(seq, seq.state, step.extra.positions)
            for seq, step in zip(seqs, steps, strict=True)
        ]
        found, raw = self.denoiser.judge(states, *gather(outcomes))
        for state, c, law in zip(states, found, raw, strict=True):
            self.denoiser.decide(state, c, law)
        return [self._commit(seq, step) for seq, step in zip(seqs, steps, strict=True)]

    def release(self, seq: Sequence) -> None:
        seq.state = None

    def preemptible(self, seq: Sequence) -> bool:
        """Always without effect on the result; of no use while nothing is cached."""
        return len(seq.view) > 0

    def _commit(self, seq: Sequence, step: Step) -> Commit:
        """Hand over what is decided without a gap; go to the next window when this one is done."""
        canvas: Canvas = seq.state
        if not canvas.masked():
            self._rows.advance(seq, canvas)
        if canvas.start >= seq.prompt_len and self._options.infill:
            seq.tokens[: seq.prompt_len] = canvas.ids[: seq.prompt_len]
        final = final_tokens(canvas, len(seq.tokens))
        if self._options.after_end == "none" and canvas.masked():
            stop = (i for i, at in enumerate(final) if canvas.ids[at] in self._host.stop_ids)
            final = final[: next(stop, len(final))]  # the text ends when all of it is decoded
        commit = Commit(
            [canvas.ids[i] for i in final], step_map=[canvas.decided[i] for i in final],
            **self._rows.kept(seq, canvas, step.extra),
        )
        if seq.logprobs is not None:
            commit.logprobs = [canvas.logprobs.pop(i) for i in final]
        return commit


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
    if o.threshold is not None and o.unmask in ("fixed", "oracle"):
        refuse("threshold", f"none with unmask={o.unmask}")
    if (o.reference is None) == (o.unmask == "oracle"):
        refuse("reference", "token ids with unmask=oracle, none without")
    if o.filter != "auto" and o.unmask != "filter":
        refuse("filter", "auto unless unmask=filter")
    if o.most is not None and o.most < o.least:
        refuse("most", f"at least least={o.least}")
    if o.refresh and (attention != "full" or o.cache == "none"):
        refuse("refresh", "0 without the prefix or dual cache")
    if o.vicinity and o.cache != "dual":
        refuse("vicinity", "0 unless cache=dual")


def block_rows(step: Step, start: int, stop: int) -> list[list[int]]:
    """The rows at positions start..stop-1, masks and final tokens alike; a canvas that stands in the step twice gives
    two groups. Rows of the prompt and of finished blocks route freely, so that their K/V stays exact."""
    positions = range(len(step)) if step.positions is None else step.positions
    rows = [i for i, at in enumerate(positions) if start <= at < stop]
    breaks = [k for k in range(1, len(rows)) if positions[rows[k]] <= positions[rows[k - 1]]]
    return [rows[a:b] for a, b in pairwise([0, *breaks, len(rows)])]


def open_filter(host: Host, o: Options) -> Filter | None:
    """The trained filter of rule "filter". Its block must be the window's."""
    if o.unmask != "filter":
        return None
    found = Filter(host.open_adapter(KIND, o.filter))
    own = host.config.block_size if host.config.attention == "block" else 32
    if found.block != (o.block_length or own):
        raise OptionError(
            "diffusion.filter", o.filter,
            f"a filter for blocks of {o.block_length or own}; this one was trained for {found.block}"
        )
    return found


def parse_ids(text: str | None) -> list[int]:
    try:
        return [int(t) for t in text.split(",")] if text else []
    except ValueError:
        raise OptionError("diffusion.reference", text, "ids separated by commas") from None
