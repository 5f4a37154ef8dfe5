"""Requests that arrive over time, served by one engine under different policies, on the wall clock.

    one       one request at a time, in order of arrival
    static    when nothing runs: everything that has arrived becomes the batch, and the batch must drain
    dynamic   as static, but the batch waits ``window`` seconds for company after its first request
    fusion    a request joins between two steps (Flover's temporal fusion, iteration-level batching)

``instances`` serves the same trace by several engines in threads, each one request at a time, from one queue.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stretto.engine.engine import Engine, Stream
from stretto.engine.params import SamplingParams
from stretto.errors import OptionError

__all__ = ["POLICIES", "Job", "Run", "instances", "poisson", "serve_trace"]

POLICIES = ("one", "static", "dynamic", "fusion")


@dataclass(frozen=True, slots=True)
class Job:
    """``at``: seconds after the start; ``tokens``: how many are generated, whatever they are."""

    at: float
    prompt: tuple[int, ...]
    tokens: int

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.tokens, temperature=0.0, ignore_eos=True)


@dataclass(slots=True)
class Run:
    """What a policy did: ``live`` counts the running sequences of every iteration; delays in seconds from arrival."""

    seconds: float = 0.0
    busy: float = 0.0  # seconds in which the engine ran
    live: list[int] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)

    @property
    def iterations(self) -> int:
        return len(self.live)

    @property
    def rows(self) -> float:
        """Sequences in flight, averaged over iterations."""
        return sum(self.live) / len(self.live) if self.live else 0.0


def poisson(n: int, gap: float, seed: int) -> list[float]:
    """Times of ``n`` arrivals with exponential gaps of mean ``gap`` seconds; the first is at 0."""
    rng, at, out = random.Random(seed), 0.0, []
    for _ in range(n):
        out.append(at)
        at += rng.expovariate(1 / gap) if gap > 0 else 0.0
    return out


def serve_trace(engine: Engine, method: Any, jobs: Sequence[Job], policy: str, *, window: float = 0.05) -> Run:
    """Serve ``jobs`` (in order of arrival) on an idle engine."""
    if policy not in POLICIES:
        raise OptionError("policy", policy, f"one of {', '.join(POLICIES)}")
    run, streams, began = Run(), [], {}
    start, following = time.perf_counter(), 0
    while following < len(jobs) or engine.busy:
        now = time.perf_counter() - start
        take = _joining(jobs, following, now, policy, engine.busy, window)
        for job in jobs[following : following + take]:
            streams += engine.add(list(job.prompt), job.params, method)
        following += take
        if not engine.busy:
            _sleep(jobs, following, now, policy, window)
            continue
        before = time.perf_counter()
        progress = engine.step()
        end = time.perf_counter()
        run.busy += end - before
        run.live.append(len(progress))
        for p in progress:
            if p.tokens:
                began.setdefault(p.stream, end - start)
            if p.finish_reason:
                job = jobs[streams.index(p.stream)]
                run.total.append(end - start - job.at)
                run.first.append(began[p.stream] - job.at)
    run.seconds = time.perf_counter() - start
    run.texts = [_text(s) for s in streams]
    return run


def _joining(jobs: Sequence[Job], following: int, now: float, policy: str, busy: bool, window: float) -> int:
    """How many of the jobs from ``following`` on join now."""
    arrived = sum(1 for job in jobs[following:] if job.at <= now)
    if policy == "fusion":
        return arrived
    if busy or not arrived:
        return 0
    if policy == "dynamic" and now < jobs[following].at + window and following + arrived < len(jobs):
        return 0
    return 1 if policy == "one" else arrived


def _sleep(jobs: Sequence[Job], following: int, now: float, policy: str, window: float) -> None:
    until = jobs[following].at + (window if policy == "dynamic" else 0.0)
    time.sleep(max(0.0, min(until - now, 0.01)))


def instances(engines: Sequence[tuple[Engine, Any]], jobs: Sequence[Job]) -> Run:
    """Serve ``jobs`` by as many threads as there are (engine, method) pairs."""
    run, lock, following = Run(texts=[[] for _ in jobs]), threading.Lock(), iter(range(len(jobs)))
    start = time.perf_counter()

    def work(engine: Engine, method: Any) -> None:
        while True:
            with lock:
                i = next(following, None)
            if i is None:
                return
            job = jobs[i]
            time.sleep(max(0.0, job.at - (time.perf_counter() - start)))
            (stream,) = engine.add(list(job.prompt), job.params, method)
            first = 0.0
            while engine.busy:
                engine.step()
                first = first or time.perf_counter() - start
                run.live.append(1)
            run.first.append(first - job.at)
            run.total.append(time.perf_counter() - start - job.at)
            run.texts[i] = _text(stream)

    threads = [threading.Thread(target=work, args=pair) for pair in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.seconds = time.perf_counter() - start
    return run


def _text(stream: Stream) -> list[int]:
    return stream.seq.tokens[stream.seq.prompt_len :]
