"""The engine: one loop for every method.

    propose, pack, forward, commit, publish

``Engine.step`` is that loop's body. One thread calls it and owns all state.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from stretto.engine.cache import PrefixCache, View
from stretto.engine.host import Host
from stretto.engine.pack import Plan, keep_states, pack
from stretto.engine.params import SamplingParams
from stretto.engine.runner import Runner
from stretto.engine.sampling import Constraint, Sampler
from stretto.engine.scheduler import Entry, Scheduler
from stretto.engine.text import StopChecker, TextDecoder
from stretto.engine.types import Commit, Lease, Method, Outcome, Sequence
from stretto.errors import CapacityError, PromptError, UnsupportedError
from stretto.models.batch import ForwardResult

__all__ = ["Engine", "Progress", "Stream"]


@dataclass(slots=True, eq=False)
class Stream:
    """One choice of a request, as the caller sees it."""

    request: int
    choice: int
    seq: Sequence
    stops: StopChecker
    entry: Entry
    arrival: float
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Progress:
    """What a step did for one stream: its new final tokens, and why it ended if it did."""

    stream: Stream
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Engine:
    """Runs sequences of any methods on one model.

    ``make_decoder`` gives an incremental text decoder; None: an engine of tokens, which refuses stop strings.
    ``max_rows`` is the row budget of a forward. After an exception in ``step`` the engine is unusable.
    """

    def __init__(
        self, runner: Runner, host: Host, *, make_decoder: Callable[[bool], TextDecoder] | None = None,
        max_rows: int = 512, max_seqs: int = 64, prefix_caching: bool = True,
    ):
        self.runner, self.host = runner, host
        self.forwards = self.rows = 0
        config = runner.config
        block = config.block_size if config.attention == "block" else 1
        use_prefix = prefix_caching and config.attention != "full" and 16 % block == 0 and runner.alloc.shares
        self.prefix = PrefixCache(runner.alloc) if use_prefix else None
        self.scheduler = Scheduler(
            runner, self.prefix, max_rows=max_rows, max_seqs=min(max_seqs, runner.alloc.most), block=block
        )
        self.watchers: list[Callable[[Stream], None]] = []  # called when a stream is about to end, unless aborted
        self._block = block
        self._make_decoder = make_decoder
        self._streams: dict[Sequence, Stream] = {}
        self._ids, self._requests = itertools.count(), itertools.count()

    @property
    def streams(self) -> list[Stream]:
        """Those that are not finished."""
        return list(self._streams.values())

    @property
    def busy(self) -> bool:
        return bool(self._streams)

    def step(self) -> list[Progress]:
        """One forward for everything that runs; what became final by it."""
        plans = self.scheduler.plan()
        if not plans:
            return []
        batch = pack(plans, block=self._block)
        result = self.runner.forward(batch, _early(plans))
        self.forwards += 1
        if batch.taps or self.runner.states:
            keep_states(self.runner, plans, result, self.forwards)
        self.rows += batch.n
        commits = self._commits(plans, result)
        return [self._apply(plan, commit, result) for plan, commit in zip(plans, commits, strict=True)]

    def add(
        self, prompt: list[int], params: SamplingParams, method: Method, *,
        priority: int = 0, salt: str = "", constraint: Callable[[], Constraint] | None = None,
        decode_text: bool = False, lease: Lease | None = None,
    ) -> list[Stream]:
        """Queue a request; one stream per choice. Raises InputError or CapacityError, and then queues nothing.

        ``lease``: rows of the prompt that are cached already, and stay when the (only) stream ends.
        """
        self._check(prompt, params, lease.shift if lease else 0)
        request, arrival = next(self._requests), time.perf_counter()
        streams: list[Stream] = []
        for choice in range(params.n):
            sampler = Sampler(
                params, choice=choice, stop_ids=self.host.stop_ids, prompt=prompt,
                constraint=constraint() if constraint else None, path=lease.path if lease else (),
            )
            seq = Sequence(
                id=next(self._ids), tokens=list(prompt), prompt_len=len(prompt), params=params, method=method,
                view=lease.view if lease else View(self.runner.alloc), sampler=sampler, choice=choice, salt=salt,
                taps=tuple(sorted({*getattr(method, "taps", ()), *self.host.taps})),
            )
            if lease is not None:
                seq.shift, seq.plain, seq.held = lease.shift, lease.plain, True
                seq.reads, seq.team = lease.reads, lease.team
            seq.logprobs = [] if params.logprobs is not None else None
            method.admit(seq)
            decoder = self._decoder(params) if params.stop or decode_text else None
            entry = Entry(seq, priority, request)
            stops = StopChecker(params, self.host.stop_ids, decoder)
            streams.append(Stream(request, choice, seq, stops, entry, arrival))
        first, rest = streams[0], streams[1:]
        before = self._streams.get(lease.behind) if lease and lease.behind else None
        if before is not None:
            before.entry.forks.append(first.entry)
        elif self.runner.alloc.shares and method.prefill(first.seq):
            first.entry.forks = [s.entry for s in rest]
        for stream in streams:
            self._streams[stream.seq] = stream
            if before is None and (stream is first or not first.entry.forks):
                self.scheduler.add(stream.entry)
        return streams

    def abort(self, stream: Stream) -> None:
        """End a stream now; idempotent. Its slots are free afterwards."""
        if stream.finish_reason is None:
            self._promote(stream)
            self._end(stream, "abort")

    def _decoder(self, params: SamplingParams) -> TextDecoder:
        if self._make_decoder is None:
            raise UnsupportedError("this engine has no tokenizer: give token ids to stop at (stop_token_ids), not text")
        return self._make_decoder(params.skip_special_tokens)

    def _check(self, prompt: list[int], params: SamplingParams, shift: int = 0) -> None:
        limit, vocabulary = self.host.max_model_len, self.runner.vocabulary
        if not prompt:
            raise PromptError("the prompt is empty: give at least one token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            bad = next(t for t in prompt if not 0 <= t < vocabulary)
            raise PromptError(f"token id {bad} is not in the vocabulary: ids go from 0 to {vocabulary - 1}")
        if len(prompt) + shift + params.max_tokens > limit:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}: together at most "
                f"{limit} (max_model_len); shorten the prompt or lower max_tokens"
            )
        total = self.runner.alloc.longest
        if len(prompt) + params.max_tokens + 64 > total:
            raise CapacityError(
                f"the request may need {len(prompt) + params.max_tokens + 64} cache slots, one may have {total}: "
                "raise kv_cache_tokens or lower max_tokens"
            )

    def _commits(self, plans: list[Plan], result: ForwardResult) -> list[Commit | None]:
        """Let every method commit its own steps, in the order of ``plans``."""
        groups: dict[Method, list[int]] = {}
        for i, plan in enumerate(plans):
            if plan.step is not None:
                groups.setdefault(plan.seq.method, []).append(i)
        commits: list[Commit | None] = [None] * len(plans)
        for method, members in groups.items():
            outcomes = []
            for i in members:
                p = plans[i]
                rows = slice(p.row + p.lead, p.row + p.rows)
                outcomes.append(
                    Outcome(result.logits, result.argmax, p.logit, p.logit + p.logits, result.hidden, rows, result.sure)
                )
            seqs = [plans[i].seq for i in members]
            done = method.commit(seqs, [plans[i].step for i in members], outcomes)
            for i, commit in zip(members, done, strict=True):
                commits[i] = commit
        return commits

    def _apply(self, plan: Plan, commit: Commit | None, result: ForwardResult) -> Progress:
        """Write one commit into its sequence: cache rows, tokens, the end."""
        seq, stream = plan.seq, self._streams[plan.seq]
        if plan.base is not None:
            seq.view.adopt(plan.base.seq.view)
        seq.metrics.rows += plan.rows
        slots, lead = plan.slots, plan.lead
        if lead:
            seq.view.append(slots[:lead])
        if commit is None:
            seq.metrics.prefill_forwards += 1
            self._share(seq)
            return Progress(stream)
        self._keep(seq, commit, slots[lead:])
        if lead:
            self._share(seq)
        seq.metrics.forwards += 1
        seq.metrics.drafted += commit.drafted
        seq.metrics.accepted += commit.accepted
        tokens = [int(t) for t in commit.tokens]
        cut = stream.stops.check(tokens, seq.generated)
        tokens = tokens[: cut.keep]
        self._record(seq, commit, tokens, result, plan)
        seq.tokens += tokens
        seq.sampler.advance(tokens)
        if tokens and not seq.metrics.ttft:
            seq.metrics.ttft = time.perf_counter() - stream.arrival
        reason = cut.reason or commit.finished
        if reason:
            stream.stop_reason = cut.stop
            self._end(stream, reason)
        return Progress(stream, tokens, reason)

    def _keep(self, seq: Sequence, commit: Commit, slots: Any) -> None:
        view, alloc = seq.view, self.runner.alloc
        if commit.truncate is not None:
            view.truncate(commit.truncate)
        rows = commit.keep
        if commit.replace is None and isinstance(rows, range) and rows.start == 0 and rows.step == 1:
            view.append(alloc.settle(view, len(view), slots[: len(rows)]))
            if len(rows) < len(slots):
                alloc.release(slots[len(rows) :])
            return
        rows = list(rows)
        kept = set(rows)
        if commit.replace is not None:
            start, inside = commit.replace
            inside = list(inside)
            view.replace(start, alloc.settle(view, start, slots[inside]))
            kept.update(inside)
        if rows:
            view.append(alloc.settle(view, len(view), slots[rows]))
        if len(kept) < len(slots):
            alloc.release(slots[[i for i in range(len(slots)) if i not in kept]])

    def _record(
        self, seq: Sequence, commit: Commit, tokens: list[int], result: ForwardResult, plan: Plan
    ) -> None:
        metrics = seq.metrics
        metrics.tokens += len(tokens)
        steps = commit.step_map
        seq.step_map += list(steps)[: len(tokens)] if steps is not None else [metrics.forwards - 1] * len(tokens)
        if seq.logprobs is None:
            return
        if commit.logprobs is not None:
            seq.logprobs += commit.logprobs[: len(tokens)]
        if commit.logprob_rows is None:
            return
        for token, row in zip(tokens, commit.logprob_rows, strict=False):
            law = torch.log_softmax(result.logits[plan.logit + row].double(), -1)
            top = torch.topk(law, seq.params.logprobs or 1).indices.tolist()[: seq.params.logprobs]
            seq.logprobs.append({t: float(law[t]) for t in [token, *top]})

    def _share(self, seq: Sequence) -> None:
        if self.prefix is not None and seq.plain:
            self.prefix.insert(seq.view, seq.tokens, seq.prefix_salt, min(len(seq.view), len(seq.tokens)))

    def _promote(self, stream: Stream) -> None:
        """The next choice takes over the prompt of an aborted first one."""
        forks = stream.entry.forks
        if forks and forks[0].seq.held:  # threads: each can evaluate its own text
            stream.entry.forks = []
            for fork in forks:
                self.scheduler.add(fork)
            return
        if forks:
            heir, stream.entry.forks = forks[0], []
            heir.forks = forks[1:]
            self.scheduler.add(heir)
            return
        for other in self._streams.values():
            if stream.entry in other.entry.forks:
                other.entry.forks.remove(stream.entry)

    def _end(self, stream: Stream, reason: str) -> None:
        seq = stream.seq
        if reason != "abort":
            for watch in self.watchers:
                watch(stream)
            self._share(seq)
            self.scheduler.spawn(stream.entry)
            self._promote(stream)
        seq.method.release(seq)
        self.scheduler.remove(stream.entry)
        del self._streams[seq]
        stream.finish_reason = reason
        seq.metrics.seconds = time.perf_counter() - stream.arrival


def _early(plans: list[Plan]) -> dict[int, Callable[[ForwardResult], None]]:
    """Who looks at which layer of this forward."""
    groups: dict[int, list[Plan]] = {}
    for plan in plans:
        if plan.step is not None and plan.step.early is not None:
            groups.setdefault(plan.step.early[0], []).append(plan)
    return {layer: partial(_show, group) for layer, group in groups.items()} if groups else {}


def _show(plans: list[Plan], result: ForwardResult) -> None:
    for p in plans:
        assert p.step is not None and p.step.early is not None
        p.step.early[1](Outcome(result.logits, result.argmax, p.logit, p.logit + p.logits, {}, slice(0, 0)))
