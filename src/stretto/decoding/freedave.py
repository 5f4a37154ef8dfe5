"""Free draft-and-verify for masked diffusion: the text of slow decoding in fewer forwards.

Static decoding S goes x0 -> x1 -> ...: each forward makes one token final (the best by ``score``). The
laws of a state also say which tokens would probably come next: drafts D_1 = S(x), D_2 = D_1 + the next
best, and so on, each one step longer. One forward evaluates all of them as branches that do not see
each other; D_k is right if D_k = S(D_k-1), and the last right one hands its own laws to the next
drafts, so no forward is wasted. With noise numbered by steps of S, sampled text is the same too.

Source: Free Draft-and-Verification (2025). A complete draft of a block is evaluated as the next
block's first state ("eager"); the subset rule of FreeDave++ is left out, because it is not lossless.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from stretto.decoding.canvas import Ask, Canvas
from stretto.decoding.denoise import (
    Denoiser,
    State,
    check_room,
    final_tokens,
    gather,
    mask_of,
    open_rows,
)
from stretto.decoding.options import option
from stretto.decoding.planner import Costs, allot
from stretto.decoding.unmask import Candidates, quota
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.errors import OptionError, PromptError

__all__ = ["FreeDave", "Options"]

PRIOR, MEMORY = 0.8, 0.06  # first guess of how often a draft holds, and the weight of a new trial
PROBE_GAP = 16  # forwards without drafts before one is tried again


@dataclass(frozen=True, kw_only=True)
class Options:
    """``draft_steps`` is the dial; the rest says which static decoding is reproduced."""

    draft_steps: int = option(
        4, "d: branches a forward evaluates at most; fewer where rows cost more than they save", low=1
    )
    eager: bool = option(
        True, "drafts may cross into the next block (block-causal models, or cache=none)"
    )
    unmask: str = option(
        "fixed", "the rule to reproduce: fixed = so many tokens a step, threshold = all that reach it",
        choices=("fixed", "threshold"),
    )
    threshold: float | None = option(None, "tau of unmask=threshold (0.9)", low=0.0)
    score: str = option(
        "confidence", "which position comes first",
        choices=("confidence", "margin", "neg_entropy", "random", "position"),
    )
    steps: int | None = option(None, "S: steps a block (fixed); none = one token a step", low=1)
    block_length: int | None = option(
        None, "tokens decoded before the next block is begun; none = 32, or the block of a "
        "block-causal model", low=1,
    )
    cache: str = option(
        "auto", "K/V of a full-attention model, as in method diffusion: the reference has the same",
        choices=("auto", "none", "prefix", "dual", "block"),
    )


@dataclass(slots=True)
class Path:
    """One sequence. ``canvas``: the state of static decoding that comes next. ``best``: what the
    last laws said of its masked positions, the next one first."""

    canvas: Canvas
    best: list[tuple[int, int]]  # (position, token)
    idle: int = 0  # forwards since drafts were last tried


class FreeDave:
    """The text of one-token-a-step diffusion decoding in fewer forwards: no training, no second
    model."""

    name = "freedave"
    lossless = True
    reference = ("diffusion", {"unmask": "fixed"})
    kinds = ("full", "block")
    grammar = False

    def __init__(self, host: Host, options: Options):
        self._mask = mask_of(host, self.name)
        check(options, host.config.attention, host.config.block_size)
        self._host, self._options = host, options
        self._denoiser = Denoiser(
            mask=self._mask, stops=host.stop_ids, unmask=options.unmask, dial=options.threshold,
            score=options.score, steps=options.steps,
        )
        self._rows = open_rows(
            host.config, self._mask, block_length=options.block_length, cache=options.cache
        )
        block = host.config.attention == "block"
        self._eager = options.eager and (block or options.cache == "none")
        self._costs = Costs(host.runner) if host.plan and options.draft_steps > 1 else None
        self._rates = np.full(options.draft_steps, PRIOR)  # share of right drafts, by depth

    def admit(self, seq: Sequence) -> None:
        if self._mask in seq.tokens:
            raise PromptError(
                f"the prompt holds the mask token {self._mask} at position "
                f"{seq.tokens.index(self._mask)}: take it out, or use method diffusion with "
                "infill=true"
            )
        check_room(self._host, self.name, self._rows.slots(seq))
        seq.state = Path(self._rows.open(seq), [])

    def prefill(self, seq: Sequence) -> int:
        return self._rows.prefill(seq, seq.state.canvas)

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        steps = []
        for seq, depth in zip(seqs, self._depths(seqs), strict=True):
            drafts = self._drafts(seq, depth)
            step = self._rows.branches(seq, drafts)
            while len(step) > seq.row_limit and len(drafts) > 1:
                seq.metrics.note("fewer draft branches than asked for: the row budget is full")
                drafts.pop()
                step = self._rows.branches(seq, drafts)
            step.extra.canvases = drafts
            steps.append(step)
        return steps

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        states = [
            [State(seq, c, ask.positions) for c, ask in zip(s.extra.canvases, s.extra.asks, strict=True)]
            for seq, s in zip(seqs, steps, strict=True)
        ]
        found, raw = self._denoiser.judge([s for group in states for s in group], *gather(outcomes))
        out, at = [], 0
        for seq, step, group in zip(seqs, steps, states, strict=True):
            s = slice(at, at + len(group))
            out.append(self._commit(seq, step.extra.asks, group, found[s], raw[s]))
            at = s.stop
        return out

    def release(self, seq: Sequence) -> None:
        seq.state = None

    def preemptible(self, seq: Sequence) -> bool:
        """Always without effect on the result; of no use while nothing is cached."""
        return len(seq.view) > 0

    def _depths(self, seqs: list[Sequence]) -> list[int]:
        """Branches for each sequence: all asked for, or as many as pay by the measured cost of rows
        and the share of drafts that were right lately."""
        most = [1 + len(s.state.best) if s.state.best else 1 for s in seqs]
        most = [min(n, self._options.draft_steps) for n in most]
        if self._costs is None or max(most) == 1:
            return most
        width = self._host.config.block_size if self._host.config.attention == "block" else None
        width = width or max(len(self._rows.step(s, s.state.canvas)) for s in seqs)
        gains = np.cumprod(self._rates).tolist()
        first = width * len(seqs)
        table = self._costs.table(max(len(s.view) for s in seqs), first + width * sum(most))
        shifted = table[first - len(seqs) :]
        counts, _ = allot([gains[: n - 1] for n in most], shifted, width=width)
        for i, seq in enumerate(seqs):
            path = seq.state
            path.idle = 0 if counts[i] or most[i] == 1 else path.idle + 1
            if path.idle >= PROBE_GAP:
                path.idle, counts[i] = 0, 1
        return [1 + n for n in counts]

    def _drafts(self, seq: Sequence, depth: int) -> list[Canvas]:
        """The state itself and up to ``depth`` - 1 guesses of the states after it."""
        path = seq.state
        out, rest = [path.canvas], path.best
        fixed = self._options.unmask == "fixed"
        while len(out) < depth:
            guess = out[-1].copy()
            take = quota(guess.count, self._options.steps, guess.turn) if fixed else 1
            rest = [(i, t) for i, t in rest if i < guess.end]
            for position, token in rest[:take]:
                self._denoiser.put(seq, guess, position, token)
            rest = rest[take:]
            guess.turn, guess.step = guess.turn + 1, guess.step + 1
            whole = not guess.masked()
            if whole:
                if not self._eager or guess.stop >= guess.end:
                    break
                self._rows.advance(seq, guess)
            out.append(guess)
            if whole or not rest:
                break
        return out

    def _commit(
        self, seq: Sequence, asks: list[Ask], states: list[State], found: list[Candidates],
        raw: list[Tensor | None],
    ) -> Commit:
        """Follow the drafts as long as each is what the rule makes of the one before."""
        best, right = 0, 0
        while True:
            after = self._successor(states[best], found[best], raw[best])
            later = range(best + 1, len(states))
            match = next((j for j in later if self._equal(seq, states[j].canvas, after)), None)
            if match is None:
                break
            states[match].canvas.logprobs = after.logprobs
            best, right = match, right + 1
        self._learn(len(states) - 1, right)
        path: Path = seq.state
        path.canvas = after
        path.best = [] if after.turn == 0 else self._next(states[best], found[best], after)
        final = final_tokens(after, len(seq.tokens))
        commit = Commit(
            [after.ids[i] for i in final], step_map=[after.decided[i] for i in final],
            drafted=len(states) - 1, accepted=right, **self._rows.kept(seq, after, asks[best]),
        )
        if seq.logprobs is not None:
            commit.logprobs = [after.logprobs.pop(i) for i in final]
        return commit

    def _successor(self, state: State, c: Candidates, law: Tensor | None) -> Canvas:
        """S(x): the state after one step of the rule, in the next window if this one is done."""
        after = State(state.seq, state.canvas.copy(), state.positions)
        self._denoiser.decide(after, c, law)
        if not after.canvas.masked():
            self._rows.advance(state.seq, after.canvas)
        return after.canvas

    def _equal(self, seq: Sequence, draft: Canvas, after: Canvas) -> bool:
        """Whether a draft is the state ``after``. Its step number decides the noise, if there is
        any."""
        noisy = seq.params.temperature > 0 or self._options.score == "random"
        if noisy and draft.step != after.step:
            return False
        return (draft.ids, draft.end, draft.start) == (after.ids, after.end, after.start)

    def _next(self, state: State, c: Candidates, after: Canvas) -> list[tuple[int, int]]:
        """What the laws of ``state`` expect where ``after`` is still masked, the best first."""
        order = np.argsort(-self._denoiser.order(state, c), kind="stable").tolist()
        left = set(after.masked())
        at = state.positions
        return [(at[i], int(c.tokens[i])) for i in order if at[i] in left]

    def _learn(self, drafted: int, right: int) -> None:
        for depth in range(min(right + 1, drafted)):
            self._rates[depth] += MEMORY * ((depth < right) - self._rates[depth])


def check(o: Options, attention: str, block: int) -> None:
    """Refuse options that the model cannot have, or that the chosen rule would ignore."""

    def refuse(name: str, allowed: str) -> None:
        raise OptionError(f"freedave.{name}", getattr(o, name), allowed)

    if attention == "full" and o.cache == "block":
        refuse("cache", "auto, none, prefix or dual for a full-attention model")
    if attention == "block" and o.cache not in ("auto", "block"):
        refuse("cache", "auto or block (exact) for a block-causal model")
    if attention == "block" and o.block_length is not None and o.block_length > block:
        refuse("block_length", f"at most {block}, the block that the model was trained with")
    if o.unmask == "threshold" and o.steps is not None:
        refuse("steps", "none with unmask=threshold")
    if o.unmask == "fixed" and o.threshold is not None:
        refuse("threshold", "none with unmask=fixed")
