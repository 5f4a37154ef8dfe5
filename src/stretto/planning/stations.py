"""A cluster by events: jobs that pass stations with a number of servers each, queues in order of arrival, barriers.

A job is a generator that yields what it does next: ``Use(station, seconds)`` of one server, ``Meet(barrier)`` until all
of the barrier's parties have come. Nothing is measured here: service times are the caller's, results are simulated
seconds.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from functools import partial

from stretto.errors import InputError, OptionError

__all__ = ["Barrier", "Job", "Meet", "Station", "Use", "simulate"]


@dataclass(eq=False)
class Station:
    """``servers`` jobs at the same time. ``busy``: seconds of service, ``waited``: of jobs in the queue."""

    name: str
    servers: int
    busy: float = 0.0
    waited: float = 0.0
    free: int = field(init=False)
    queue: deque[tuple[float, Job, float]] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        if self.servers < 1:
            raise OptionError("servers", self.servers, f"a whole number from 1 for station {self.name!r}")
        self.free = self.servers


@dataclass(eq=False)
class Barrier:
    """Holds jobs until ``parties`` have come, again and again; ``leave`` lowers that number. ``waited``: seconds."""

    parties: int
    waited: float = 0.0
    here: list[tuple[float, Job]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Use:
    station: Station
    seconds: float


@dataclass(frozen=True, slots=True)
class Meet:
    """``leave``: come for the last time (the job is not held, and the others no longer wait for it)."""

    barrier: Barrier
    leave: bool = False


Job = Generator[Use | Meet, None, None]


def simulate(jobs: Iterable[Job]) -> float:
    """Run all jobs from time 0; when the last one ends. InputError where some wait for ever at a barrier."""
    events = _Events()
    for job in jobs:
        events.alive += 1
        events.at(0.0, partial(events.go, job))
    clock = 0.0
    while events.heap:
        clock, _, what = heapq.heappop(events.heap)
        what(clock)
    if events.alive:
        raise InputError(f"{events.alive} jobs wait for ever: a barrier has more parties than jobs that come to it")
    return clock


class _Events:
    """What happens next, in order of time, then of entry."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Callable[[float], None]]] = []
        self.alive = 0
        self._order = itertools.count()

    def at(self, time: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self.heap, (time, next(self._order), what))

    def go(self, job: Job, now: float) -> None:
        """Let ``job`` say what it does next."""
        try:
            step = next(job)
        except StopIteration:
            self.alive -= 1
            return
        if isinstance(step, Use):
            self._enter(step.station, job, step.seconds, now)
        else:
            self._meet(step, job, now)

    def _enter(self, station: Station, job: Job, seconds: float, now: float) -> None:
        if not station.free:
            station.queue.append((now, job, seconds))
            return
        station.free -= 1
        station.busy += seconds
        self.at(now + seconds, partial(self._leave, station, job))

    def _leave(self, station: Station, job: Job, now: float) -> None:
        station.free += 1
        if station.queue:
            since, other, seconds = station.queue.popleft()
            station.waited += now - since
            self._enter(station, other, seconds, now)
        self.go(job, now)

    def _meet(self, step: Meet, job: Job, now: float) -> None:
        barrier = step.barrier
        if step.leave:
            barrier.parties -= 1
            self.at(now, partial(self.go, job))
        else:
            barrier.here.append((now, job))
        if barrier.here and len(barrier.here) >= barrier.parties:
            held, barrier.here = barrier.here, []
            for since, other in held:
                barrier.waited += now - since
                self.at(now, partial(self.go, other))
