"""A control loop: one decision at every tick of a clock, and how late each came.

Function calls that steer something (a robot, a game, a house) are worth nothing late. The loop keeps to a fixed rate,
not to a fixed pause: a latency is counted from when its tick was due, so a decision that takes longer than a period
makes the next one late as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from stretto.errors import OptionError

__all__ = ["Ticks", "control_loop"]


@dataclass(frozen=True, slots=True)
class Ticks:
    """``latencies``: seconds from when each tick was due until its decision was there, in order; ``rate`` in Hz."""

    rate: float
    latencies: tuple[float, ...]

    def at(self, share: float) -> float:
        """The latency that ``share`` of the ticks keep to (0.5 = p50, 0.99 = p99)."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def in_time(self) -> float:
        """Share of decisions that came before the next tick was due."""
        return sum(t <= 1 / self.rate for t in self.latencies) / len(self.latencies)


def control_loop(
    decide: Callable[[Any], Any], states: Iterable[Any], rate: float, *,
    clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep,
) -> Ticks:
    """Call ``decide`` with one state each 1 / ``rate`` seconds. Raises OptionError for a rate that is not positive, or
    without any state."""
    if not rate > 0:
        raise OptionError("rate", rate, "a number of Hz above 0")
    start, latencies = clock(), []
    for i, state in enumerate(states):
        due = start + i / rate
        if (wait := due - clock()) > 0:
            sleep(wait)
        decide(state)
        latencies.append(clock() - due)
    if not latencies:
        raise OptionError("states", [], "at least one state")
    return Ticks(rate, tuple(latencies))
