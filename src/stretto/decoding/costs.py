"""What a step costs and what drafts are worth: the measured seconds of rows, rates of acceptance, and the split.

``Costs`` turns the latency curves of a runner into a table by rows; ``Rates`` keeps how often drafts of a kind are
right; ``allot`` finds how many of the offered drafts give the most tokens a second.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from stretto.engine.runner import LatencyCurve, Runner

__all__ = ["INHERITED", "Costs", "Rates", "Typical", "allot"]

INHERITED = 3  # trials that the rate one depth up counts for
FADING = 0.97  # trials of a depth that a step did not reach keep this share: what is long ago is tried again
SMALL_FORWARD = 5e-3  # seconds; below it the context counts beside the weights


def allot(
    offers: Seq[Seq[float]], target: Seq[float], *, fixed: float = 0.0, extra: Seq[float] | None = None,
    width: int = 1, levels: Seq[float] | None = None, depths: Seq[Seq[int]] | None = None, margin: float = 1.0,
) -> tuple[list[int], float]:
    """How many of its offered drafts each sequence gets, and the tokens per second expected then.

    ``offers[i]``: gains (path products) of the drafts of sequence i, falling; ``target[n]``: seconds of a forward of n
    rows; ``fixed``: seconds of every step; ``extra[i]``: seconds as soon as sequence i drafts; ``width``: rows of a
    draft; ``levels[n]``: seconds of a draft model's forward of n rows, one forward per depth of ``depths[i][j]``;
    ``margin``: how many times the rate without drafts is asked for.
    """
    rows = len(offers)
    items = [(-gain, i, j) for i, gains in enumerate(offers) for j, gain in enumerate(gains)]
    if rows > 1:
        items.sort()
    total, cost, used, picked = float(rows), fixed, {}, 0
    best = margin * total / (cost + target[rows])
    for k, (loss, i, j) in enumerate(items, 1):
        total -= loss
        rows += width
        if j == 0 and extra is not None:
            cost += extra[i]
        if levels is not None:
            depth = depths[i][j] if depths is not None else j
            n = used.get(depth, 0)
            used[depth] = n + 1
            cost += levels[n + 1] - (levels[n] if n else 0.0)
        rate = total / (cost + target[rows])
        if rate > best:
            best, picked = rate, k
    counts = [0] * len(offers)
    for _, i, _ in items[:picked]:
        counts[i] += 1
    return counts, best


class Typical:
    """A typical duration: quick to fall, slow to rise, 0 until FIRST values have been seen.

    Outliers (another process had the core) and the cold start hardly move it."""

    FIRST = 5
    __slots__ = ("_first", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._first: list[float] = []

    def learn(self, seconds: float) -> None:
        if len(self._first) < self.FIRST:
            self._first.append(seconds)
            if len(self._first) == self.FIRST:
                self.value = min(self._first)
            return
        step = seconds - self.value
        self.value += 0.3 * step if step < 0 else 0.05 * min(step, abs(self.value))


class Costs:
    """Seconds of a forward by rows, for the context at hand: two measured curves, linear between them.

    ``scale`` follows what forwards take in earnest (``observe``), where the method runs them itself.
    """

    def __init__(self, runner: Runner):
        near = runner.curve(128)
        self.one = near(1)
        self._near, self._far = near, runner.curve(1024) if self.one < SMALL_FORWARD else None
        self._tables: dict[int, list[float]] = {}
        self.scale, self._ratio = 1.0, Typical()

    def table(self, context: int, rows: int) -> list[float]:
        """seconds[n] for n = 0..rows at least."""
        bucket = max(6, context.bit_length())
        table = self._tables.get(bucket)
        if table is None or len(table) <= rows:
            table = self._tables[bucket] = self._build(0.75 * (1 << bucket), max(256, 2 * rows))
        return table

    def _build(self, context: float, rows: int) -> list[float]:
        near = _seconds(self._near, rows)
        if self._far is None:
            return near.tolist()
        share = (context - 128) / (1024 - 128)
        mixed = near + share * (_seconds(self._far, rows) - near)
        return np.maximum.accumulate(np.maximum(mixed, 0.5 * near)).tolist()

    def observe(self, seconds: float, expected: float) -> None:
        self._ratio.learn(seconds / expected)
        self.scale = self._ratio.value or 1.0


def _seconds(curve: LatencyCurve, rows: int) -> np.ndarray:
    """float64 [rows + 1]: the curve at 0..rows."""
    n = np.arange(rows + 1)
    out = np.interp(n, curve.rows, curve.seconds)
    last = int(curve.rows[-1])
    if rows > last:
        out[last:] = np.linspace(curve(last), curve(rows), rows - last + 1)
    return out


class Rates:
    """P(a draft is right | its parent is right) by key; running averages that become exponential ones.

    ``trials``: how many trials each rate counts for now."""

    __slots__ = ("horizon", "rate", "trials")

    def __init__(self, rate: Seq[float], trials: Seq[float], horizon: int):
        self.rate, self.trials, self.horizon = list(rate), list(trials), horizon

    def learn(self, key: int, hit: float) -> None:
        n = self.trials[key] = min(self.trials[key] + 1, self.horizon)
        self.rate[key] += (hit - self.rate[key]) / n

    def gains(self, keys: Seq[int]) -> list[float]:
        """Path products along a chain. A depth with few trials is taken to be like the one before it."""
        out, gain, last = [], 1.0, 0.0
        rate, trials = self.rate, self.trials
        for key in keys:
            n = trials[key]
            last = (n * rate[key] + INHERITED * last) / (n + INHERITED) if out else rate[key]
            gain *= last
            out.append(gain)
        return out

    def fade(self, keys: Seq[int]) -> None:
        for key in keys:
            self.trials[key] *= FADING

    def learn_chain(self, keys: Seq[int], accepted: int) -> None:
        rate, trials, horizon = self.rate, self.trials, self.horizon
        for i, key in enumerate(keys[: accepted + 1]):
            n = trials[key]
            if n < horizon:
                n = trials[key] = n + 1
            rate[key] += ((i < accepted) - rate[key]) / n
