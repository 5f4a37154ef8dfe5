"""Timing that survives a noisy machine: every method runs on the same prompts, in turns, in the same minutes.

A *round* is a group of prompts. Inside it each chunk of ``batch`` prompts is decoded by every arm in turn, and the
order turns by one with every chunk, so that drift, frequency changes and warm caches hit all arms alike. Each arm
sees each prompt once: a method that remembers earlier outputs gains nothing by repetition. Figures are ratios
within a round; a result is their median, its spread their range.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Arm", "Item", "Track", "geometric", "measure", "ratios", "spread"]


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt of a task. ``score``: output text -> 0..1."""

    task: str
    family: str
    prompt: str
    max_tokens: int
    score: Callable[[str], float] | None = None
    shown: str = ""  # the prompt for human eyes


@dataclass(slots=True, eq=False)
class Arm:
    """One thing to measure: a method with its options on a loaded model. ``llm`` is an ``stretto.llm.LLM``."""

    llm: Any
    model: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        self.label = self.label or self.method

    def generate(self, items: Sequence[Item]) -> list[Any]:
        """Greedy completions of ``items`` in one batch; one RequestOutput each."""
        from stretto.engine.params import SamplingParams

        params = [SamplingParams(max_tokens=i.max_tokens, temperature=0.0) for i in items]
        return self.llm.generate(
            [i.prompt for i in items], params, method=self.method, options=dict(self.options)
        )


@dataclass(slots=True)
class Track:
    """What one arm did: wall-clock seconds of each round, and each prompt's output and seconds, in prompt order."""

    arm: Arm
    rounds: list[float] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def total(self, name: str) -> float:
        """Sum of one of the engine's counters over all prompts."""
        return sum(getattr(o.metrics, name) for o in self.outputs)


def measure(
    arms: Sequence[Arm], rounds: Sequence[Sequence[Item]], *, batch: int = 1,
    tick: Callable[[], None] | None = None, clock: Callable[[], float] = time.perf_counter,
) -> list[Track]:
    """Decode all items of all rounds by all arms, interleaved; one track an arm. ``tick`` is called after each run."""
    tracks = [Track(arm) for arm in arms]
    turn = 0
    for items in rounds:
        for track in tracks:
            track.rounds.append(0.0)
        for start in range(0, len(items), batch):
            chunk = items[start : start + batch]
            for i in range(len(arms)):
                track = tracks[(i + turn) % len(arms)]
                gc.collect(0)
                begin = clock()
                outputs = track.arm.generate(chunk)
                seconds = clock() - begin
                track.rounds[-1] += seconds
                track.outputs += outputs
                track.seconds += [seconds / len(chunk)] * len(chunk)
                if tick is not None:
                    tick()
            turn += 1
    return tracks


def ratios(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """Per round: how many times faster ``other`` was than ``base``."""
    return [b / max(o, 1e-12) for b, o in zip(base, other, strict=True)]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, smallest, largest)."""
    return statistics.median(values), min(values), max(values)


def geometric(values: Sequence[float]) -> float:
    """Geometric mean of positive numbers."""
    return math.exp(sum(math.log(v) for v in values) / len(values))
