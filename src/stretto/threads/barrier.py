"""The price of a barrier, by simulation: chains in step and chains on their own, on a cluster that is not here.

Per turn and chain: draft sampling (tokens x seconds a token), verification (seconds a chunk), and for a share alpha
target sampling. In step: every turn all chains of the question wait for the slowest twice, before the ranking and
after the take-overs. Lengths have a heavy tail: log-normal of mean ``length`` and shape ``sigma`` (0: all equal).

The paper's measure: arithmetic intensity with the wait in its denominator (its exact form is not published):
    I = FLOPs / (bytes moved + bandwidth x seconds of synchronisation).
Everything here is simulated time: it explains, and stands for no measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stretto.errors import OptionError
from stretto.planning.stations import Barrier, Meet, Station, Use, simulate

__all__ = ["Cluster", "Outcome", "intensity", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """``draft_slots``, ``score_slots``, ``target_slots``: chunks that each stage serves at the same time; ``draft``,
    ``target``: seconds a token; ``score``: seconds a chunk; ``k`` chains, ``turns``, tokens a chunk as above."""

    k: int = 16
    turns: int = 15
    alpha: float = 0.4
    length: float = 100.0
    sigma: float = 1.0
    draft: float = 0.005
    score: float = 0.05
    target: float = 0.03
    draft_slots: int = 16
    score_slots: int = 4
    target_slots: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or min(self.k, self.turns) < 1 or min(self.length, self.sigma + 1) <= 0:
            raise OptionError("cluster", self, "alpha from 0 to 1, k and turns from 1, a positive length")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Simulated seconds of a question, the seconds its chains stood at barriers, and of service by stage."""

    seconds: float
    held: float
    busy: dict[str, float]


def run(c: Cluster, *, in_step: bool, seed: int = 0) -> Outcome:
    """One question. Both ways get the same lengths and the same number of take-overs a turn, from the same seed."""
    rng = np.random.default_rng(seed)
    drawn = lambda: c.length * rng.lognormal(-c.sigma**2 / 2, c.sigma, (c.turns, c.k))
    drafts, targets = drawn(), drawn()
    rank = rng.random((c.turns, c.k)).argsort(1).argsort(1)
    over = rank < round(c.alpha * c.k)
    stages = [Station("draft", c.draft_slots), Station("score", c.score_slots), Station("target", c.target_slots)]
    barrier = Barrier(c.k)

    def chain(i: int) -> Iterator[Use | Meet]:
        for t in range(c.turns):
            yield Use(stages[0], c.draft * drafts[t, i])
            yield Use(stages[1], c.score)
            if in_step:
                yield Meet(barrier)
            if over[t, i]:
                yield Use(stages[2], c.target * targets[t, i])
            if in_step:
                yield Meet(barrier)

    seconds = simulate(chain(i) for i in range(c.k))  # type: ignore[arg-type]
    return Outcome(seconds, barrier.waited, {s.name: s.busy for s in stages})


def intensity(flops: float, moved: float, bandwidth: float, waited: float) -> float:
    """FLOPs a byte, where waiting counts as bytes that could have been moved."""
    return flops / (moved + bandwidth * waited)
