"""Mirrored speculation: a draft works beside the target, and not before it.

The target's forward is looked at behind ``early_exit_layer``: the likeliest next tokens of every row there go to the
draft's worker, which drafts on under each of them while the target's upper layers run. The target alone decides, by its
last layer; the draft's continuation of what it decided is the next window, ready or nearly so. The early exit only
selects where draft work is spent, so the output is plain decoding's whatever the draft does. (Mirror Speculative
Decoding, arXiv 2510.13161. A step costs T(1..l) + max(T(l+1..N), T_draft) instead of T_draft + T(1..N).)
"""

from __future__ import annotations

import os
import time
import weakref
from dataclasses import dataclass, field

import numpy as np
import torch

from stretto.decoding.ar import require_causal
from stretto.decoding.mirror_worker import CLOSE, EARLY, OPEN, VERDICT, Worker
from stretto.decoding.options import option
from stretto.decoding.planner import Pace, Planner, rested, room
from stretto.decoding.verify import accept_chain
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.errors import OptionError

__all__ = ["Mirror", "Options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Mirrored speculation (Mirror-SD, 2025); the paper uses gamma 7 and kappa 8 with a device for each side."""

    model: str = option("zoo:tiny-draft", "the draft: zoo name, directory or hub id; same tokenizer")
    num_draft_tokens: int = option(4, "gamma: tokens of a window", low=1, high=32)
    early_top_k: int = option(2, "kappa: candidates a row that the early exit sends", low=1, high=4096)
    early_exit_layer: int = option(0, "l: layers below the exit; 0 = half of them", low=0, high=1024)
    draft_timeout: float = option(0.05, "longest wait for a window, in seconds", low=0.0, high=60.0)
    pin: bool = option(False, "give the two sides a processor core each")
    trace: bool = option(False, "keep when each side worked, for a timeline")


@dataclass(slots=True)
class _State:
    """``step``: verdicts so far. ``sent``: whether the worker knows the sequence. ``window``: under verification."""

    pace: Pace
    step: int = 0
    sent: bool = False
    window: list[int] = field(default_factory=list)
    drafting: bool = False


class Mirror:
    """A draft on a core of its own guesses ahead while the target still computes: hides the draft's time."""

    name = "mirror"
    lossless = True
    aliases = ("mirror_sd",)
    kinds = ("causal",)

    def __init__(self, host: Host, options: Options):
        self._host, self._o = host, options
        layers, vocabulary = host.config.num_hidden_layers, host.config.vocab_size
        self.exit = options.early_exit_layer or max(1, layers // 2)
        if not 1 <= self.exit < layers:
            raise OptionError("mirror.early_exit_layer", self.exit, f"1..{layers - 1}: the target has {layers} layers")
        if options.early_top_k > vocabulary:
            raise OptionError("mirror.early_top_k", options.early_top_k, f"at most the vocabulary, {vocabulary}")
        runner = host.open_runner(options.model)
        if (kind := runner.config.attention) != "causal":
            raise OptionError("mirror.model", options.model, f"a model with causal attention, not {kind}")
        self.planner = Planner(host, [0.6] * options.num_draft_tokens, probe=options.num_draft_tokens, patience=3)
        cores = _cores(host, options.pin)
        self.worker = Worker(runner, options.num_draft_tokens, core=cores[1] if cores else None, trace=options.trace)
        if cores:
            os.sched_setaffinity(0, {cores[0]})
        weakref.finalize(self, self.worker.stop)
        self._timeout = options.draft_timeout
        if self.planner.target is not None:  # a window that takes longer than its tokens by plain decoding never pays
            self._timeout = min(self._timeout, (options.num_draft_tokens + 1) * self.planner.target.one)
        self._start = 0.0

    def admit(self, seq: Sequence) -> None:
        require_causal(self._host, self.name)
        seq.state = _State(self.planner.pace())

    def prefill(self, seq: Sequence) -> int:
        return len(seq.tokens) - 1

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        if (resting := self.planner.rest(seqs, [s.state.pace for s in seqs])) is not None:
            for seq in seqs:
                self._forget(seq)  # what the worker knows of it goes stale
            return resting
        start = self.planner.begin()
        offers = [self._offer(seq) for seq in seqs]
        counts = self.planner.allot(seqs, [s.state.pace for s in seqs], offers)
        steps = [self._step(seq, n) for seq, n in zip(seqs, counts, strict=True)]
        self.planner.pause(start)
        self._start = time.perf_counter()
        return steps

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        if (plain := rested(seqs, steps, outcomes)) is not None:
            return plain
        start = time.perf_counter()
        self.worker.stats.mark("target", f"layers {self.exit + 1}..", self._start)
        commits = [self._commit(*item) for item in zip(seqs, steps, outcomes, strict=True)]
        self.planner.end(start, len(seqs), sum(c.drafted for c in commits))
        return commits

    def release(self, seq: Sequence) -> None:
        self._forget(seq)
        seq.state = None

    def preemptible(self, seq: Sequence) -> bool:
        return True

    def _forget(self, seq: Sequence) -> None:
        if seq.state.sent:
            self.worker.post(CLOSE, seq.id)
            seq.state.sent, seq.state.step = False, 0

    def _offer(self, seq: Sequence) -> list[float]:
        limit = min(self._o.num_draft_tokens, room(seq))
        if not limit or self.worker.failure is not None or self.planner.asleep(seq, seq.state.pace):
            return []
        return seq.state.pace.rates.gains(range(limit))

    def _step(self, seq: Sequence, n: int) -> Step:
        """The root and as much of the window as is allowed; without a window the draft still gets the early look."""
        state = seq.state
        state.window, state.drafting = [], n > 0
        if self.worker.failure is not None:
            seq.metrics.note(f"drafting ended: {self.worker.failure}")
        if not n:
            return Step([seq.tokens[-1]])
        if not state.sent:
            state.sent = True
            self.worker.post(OPEN, seq.id, list(seq.tokens), state.step)
        elif state.step:
            state.window = self.worker.take(seq.id, state.step, self._timeout)[:n]
        return Step([seq.tokens[-1], *state.window], early=(self.exit, lambda outcome: self._early(seq, outcome)))

    def _early(self, seq: Sequence, outcome: Outcome) -> None:
        """Send the early exit's candidates behind every prefix of the window."""
        if self.worker.stats.trace is not None:
            self.worker.stats.mark("target", f"layers 1..{self.exit}", self._start)
            self._start = time.perf_counter()
        state = seq.state
        top = torch.topk(torch.log_softmax(outcome.logits, -1), self._o.early_top_k, -1)
        logp = top.values.to(torch.bfloat16)
        self.worker.post(EARLY, seq.id, state.step, top.indices.numpy().astype(np.int32), logp)

    def _commit(self, seq: Sequence, step: Step, outcome: Outcome) -> Commit:
        state = seq.state
        commit = accept_chain(seq, step.tokens, outcome)
        if state.window:
            self.planner.judged(state.pace, range(len(state.window)), commit.accepted)
        elif state.drafting and state.step:
            self.planner.judged(state.pace, (0,), 0)  # a late window is worth as much as a wrong one
        if state.sent:
            token, more = int(commit.tokens[-1]), state.drafting
            self.worker.post(VERDICT, seq.id, state.step, commit.accepted, token, more, wake=more)
            state.step += 1
        return commit


def _cores(host: Host, pin: bool) -> tuple[int, int] | None:
    """A core for the target and one for the draft, if they are to be pinned and there are two."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        host.notes.append("mirror: target and draft share one core, so nothing is hidden")
        return None
    if torch.get_num_threads() >= len(cores):
        host.notes.append(
            f"mirror: the target runs on {torch.get_num_threads()} threads of {len(cores)} cores, and the draft beside "
            "it: leave it a core (threads=1)"
        )
    return (cores[0], cores[-1]) if pin else None
