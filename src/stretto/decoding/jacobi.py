"""Jacobi decoding: guesses for the next tokens, refined by the model's own answers until they are fixed points.

A step evaluates the root and a block of n guesses. Row i answers what follows guess i; the guesses that equal the
answers before them are final (the fixed point has reached them), and the answers behind them are the next guesses.
With sampling, the noise of every position is fixed, so the text is still one deterministic function of the prompt: its
fixed points are plain decoding's tokens. (Santilli et al., arXiv 2305.10427.)
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from stretto.decoding.ar import require_causal
from stretto.decoding.options import option
from stretto.decoding.planner import Pace, Planner, rested, room
from stretto.decoding.verify import accept_chain, choose
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step

__all__ = ["Jacobi", "Options", "answers_along", "settle"]

DEPTHS = 8  # depths whose acceptance is kept apart; key = 2 * depth + (the guess did not change in the last step)
PRIOR = [0.4, 0.8] * DEPTHS


@dataclass(frozen=True, kw_only=True)
class Options:
    """Jacobi decoding (Santilli et al., 2023)."""

    block: int = option(7, "n: guesses evaluated beside the root, in tokens", low=1, high=63)


@dataclass(slots=True)
class _State:
    """``guesses`` for the tokens behind the root; ``stable[i]``: guess i survived the last step."""

    pace: Pace
    guesses: list[int] = field(default_factory=list)
    stable: list[bool] = field(default_factory=list)


class Jacobi:
    """Refines a block of guesses in parallel, without a draft: pays for models trained to converge so."""

    name = "jacobi"
    lossless = True
    kinds = ("causal",)

    def __init__(self, host: Host, options: Options):
        self._host, self._n = host, options.block
        self.planner = Planner(host, PRIOR, probe=4, patience=3)

    def admit(self, seq: Sequence) -> None:
        require_causal(self._host, self.name)
        seq.state = _State(self.planner.pace())

    def prefill(self, seq: Sequence) -> int:
        return len(seq.tokens) - 1

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        if (resting := self.planner.rest(seqs, [s.state.pace for s in seqs])) is not None:
            return resting
        start = self.planner.begin()
        offers = [self._offer(seq) for seq in seqs]
        paces, tag = [s.state.pace for s in seqs], hash(tuple(seqs[0].state.stable))
        counts = self.planner.allot(seqs, paces, offers, tag=tag)
        steps = [
            Step([seq.tokens[-1], *seq.state.guesses[:n]]) for seq, n in zip(seqs, counts, strict=True)
        ]
        self.planner.pause(start)
        return steps

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        if (commits := rested(seqs, steps, outcomes)) is not None:
            return commits
        start = time.perf_counter()
        commits = [self._commit(*item) for item in zip(seqs, steps, outcomes, strict=True)]
        self.planner.end(start, len(seqs), sum(c.drafted for c in commits))
        return commits

    def release(self, seq: Sequence) -> None:
        seq.state = None

    def preemptible(self, seq: Sequence) -> bool:
        return True

    def _offer(self, seq: Sequence) -> list[float]:
        """Path products of the guesses; missing ones are filled with tokens of the text, which harms nothing."""
        state = seq.state
        if self.planner.asleep(seq, state.pace):
            return []
        if missing := self._n - len(state.guesses):
            text = seq.tokens[-missing:]
            state.guesses += (text * missing)[:missing]
            state.stable += [False] * missing
        gains, gain, rates = [], 1.0, state.pace.rates.rate
        for key in _keys(state, min(self._n, room(seq))):
            gain *= rates[key]
            gains.append(gain)
        return gains

    def _commit(self, seq: Sequence, step: Step, outcome: Outcome) -> Commit:
        state, tokens = seq.state, step.tokens
        n = len(tokens) - 1
        if not n:
            state.guesses, state.stable = [], []
            return accept_chain(seq, tokens, outcome)
        answers, hits = answers_along(seq, tokens, outcome), 0
        while hits < n and answers[hits] == tokens[hits + 1]:
            hits += 1
        self.planner.judged(state.pace, _keys(state, n), hits)
        old = state.guesses[hits + 1 :]
        state.guesses = settle(state.guesses, answers, hits)
        state.stable = [i < len(old) and g == old[i] for i, g in enumerate(state.guesses)]
        return Commit(
            tokens=answers[: hits + 1], keep=range(hits + 1), drafted=n, accepted=hits,
            logprob_rows=range(hits + 1),
        )


def answers_along(seq: Sequence, tokens: Seq[int], outcome: Outcome) -> list[int]:
    """What plain decoding would emit behind each row of the chain ``tokens`` (root first)."""
    if seq.sampler.plain:
        return outcome.argmax[: len(tokens)].tolist()
    return [choose(seq, outcome, i, tokens[1 : i + 1]) for i in range(len(tokens))]


def settle(guesses: list[int], answers: list[int], hits: int) -> list[int]:
    """The guesses behind the new root, ``answers[hits]``: answers to rows that were evaluated, then old guesses."""
    return answers[hits + 1 :] + guesses[len(answers) :]


def _keys(state: _State, n: int) -> list[int]:
    return [2 * min(i, DEPTHS - 1) + state.stable[i] for i in range(n)]

