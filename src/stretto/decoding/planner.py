"""The planner: how many tokens to draft, from live acceptance and the measured cost of rows.

A step over B sequences that drafts K tokens is worth (B + sum of their path products) / (t_fixed + t_draft + t(B + K))
tokens a second. Drafts are taken in the order of their products, whosever they are (water-filling), as long as the
best value lies ahead; K = 0 is among the choices and costs nothing: no draft is made, and only what a credit
of one per cent of the time allows is spent on probes that look whether drafting would pay by now.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from stretto.engine.host import Host
from stretto.engine.runner import Runner
from stretto.engine.types import Sequence
from stretto.errors import CapacityError

__all__ = ["Costs", "Pace", "Planner", "Rates", "allot", "room"]

OWN_HORIZON, SHARED_HORIZON = 24, 256  # trials that the averages remember
PRIOR_TRIALS = 6  # what the shared rates count for in a new sequence
PROBE_SHARE = 0.01  # of the time
PROBE_GAP = 16  # steps of one sequence between two probes
NOTE_AFTER = 4  # declined steps in a row before the result says so
RETURN_MARGIN = 0.9  # hysteresis: gains of a sequence that is switched off count this much
SMALL_FORWARD = 5e-3  # seconds; below it the context counts beside the weights


def room(seq: Sequence) -> int:
    """How many drafted tokens the sequence can use now: rows it may have, tokens max_tokens still allows."""
    return max(0, min(seq.row_limit, seq.remaining) - 1)


def allot(
    offers: Seq[Seq[float]], target: Seq[float], *, fixed: float = 0.0, extra: Seq[float] | None = None,
    width: int = 1, levels: Seq[float] | None = None, depths: Seq[Seq[int]] | None = None,
) -> tuple[list[int], float]:
    """How many of its offered drafts each sequence gets, and the tokens per second expected then.

    ``offers[i]``: gains (path products) of the drafts of sequence i, falling; ``target[n]``: seconds of a forward of n
    rows; ``fixed``: seconds of every step; ``extra[i]``: seconds as soon as sequence i drafts; ``width``: rows of a
    draft; ``levels[n]``: seconds of a draft model's forward of n rows, one forward per depth of ``depths[i][j]``.
    """
    rows = len(offers)
    items = [(-gain, i, j) for i, gains in enumerate(offers) for j, gain in enumerate(gains)]
    if rows > 1:
        items.sort()
    total, cost, used, picked = float(rows), fixed, {}, 0
    best = total / (cost + target[rows])
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


class Costs:
    """Seconds of a forward by rows, for the context at hand: two measured curves, linear between them.

    ``scale`` follows what forwards take in earnest (``observe``), where the method runs them itself.
    """

    def __init__(self, runner: Runner):
        near = runner.curve(128)
        self.one = near(1)
        self._near, self._far = near, runner.curve(1024) if self.one < SMALL_FORWARD else None
        self._tables: dict[int, list[float]] = {}
        self.scale = 1.0

    def table(self, context: int, rows: int) -> list[float]:
        """seconds[n] for n = 0..rows at least."""
        bucket = max(6, context.bit_length())
        table = self._tables.get(bucket)
        if table is None or len(table) <= rows:
            table = self._tables[bucket] = self._build(0.75 * (1 << bucket), max(256, 2 * rows))
        return table

    def _build(self, context: float, rows: int) -> list[float]:
        near = [self._near(n) for n in range(rows + 1)]
        if self._far is None:
            return near
        share = (context - 128) / (1024 - 128)
        mixed = [a + share * (self._far(n) - a) for n, a in enumerate(near)]
        out = [max(m, 0.5 * a) for m, a in zip(mixed, near, strict=True)]
        for n in range(1, len(out)):
            out[n] = max(out[n], out[n - 1])
        return out

    def observe(self, seconds: float, expected: float) -> None:
        if expected > 0:
            ratio = min(4.0, max(0.25, seconds / expected))
            self.scale += 0.05 * (ratio - self.scale)


class Rates:
    """P(a draft is right | its parent is right) by key; running averages that become exponential ones."""

    __slots__ = ("horizon", "rate", "trials")

    def __init__(self, rate: Seq[float], trials: float, horizon: int):
        self.rate, self.trials, self.horizon = list(rate), [trials] * len(rate), horizon

    def learn(self, key: int, hit: float) -> None:
        n = self.trials[key] = min(self.trials[key] + 1, self.horizon)
        self.rate[key] += (hit - self.rate[key]) / n


@dataclass(slots=True)
class Pace:
    """What the planner knows of one sequence."""

    rates: Rates
    off: bool = False
    idle: int = 0  # steps since it was switched off
    probing: int = 0  # steps that the probe under way may go on without a hit
    memo: dict[tuple, int] = field(default_factory=dict)  # decisions until the rates change


class Planner:
    """One per method instance: shared rates, the target's costs, the method's own time.

    ``prior``: the rates to start from, by key; keys are the method's. With ``host.plan`` false every offer is taken.
    ``probe``: most drafts of a probe; ``patience``: steps that a probe may take until its first hit.
    """

    def __init__(
        self, host: Host, prior: Seq[float], *, draft: Runner | None = None, probe: int = 2, patience: int = 1,
    ):
        self.shared = Rates(prior, 4, SHARED_HORIZON)
        self.active, self._probe, self._patience = host.plan, probe, patience
        self.target = self.draft = None
        if host.plan:
            try:
                self.target = Costs(host.runner)
                self.draft = Costs(draft) if draft is not None else None
            except CapacityError as e:
                self.active = False
                host.notes.append(f"drafting by fixed lengths: {e}")
        self._own = (_Typical(), _Typical())  # seconds per sequence of a step without drafts, with drafts
        self._between = _Typical()  # seconds of a step outside of the forward and the method
        self._spent = self._ended = self._credit = self._share = 0.0

    def pace(self) -> Pace:
        return Pace(Rates(self.shared.rate, PRIOR_TRIALS, OWN_HORIZON))

    def begin(self) -> float:
        """Call first in propose; the moment, for ``pause``."""
        now = time.perf_counter()
        if self._ended and self.target is not None:
            self._between.learn(min(now - self._ended, self.target.one))  # longer ones are waiting, not work
            self._ended = 0.0
        return now

    def pause(self, start: float, without: float = 0.0) -> None:
        """Call last in propose; ``without``: seconds of forwards in between."""
        self._spent = time.perf_counter() - start - without

    def end(self, start: float, sequences: int, drafted: int) -> None:
        """Call last in commit."""
        self._ended = time.perf_counter()
        self._own[drafted > 0].learn((self._spent + self._ended - start) / sequences)

    def asleep(self, seq: Sequence, pace: Pace) -> bool:
        """Whether the method is switched off for this step of ``seq`` and need not even make an offer."""
        if not pace.off or pace.probing or pace.idle < NOTE_AFTER:
            return False
        pace.idle += 1
        self._credit += self._share
        return pace.idle % PROBE_GAP != 0

    def allot(
        self, seqs: Seq[Sequence], paces: Seq[Pace], offers: Seq[Seq[float]], *, width: int = 1,
        depths: Seq[Seq[int]] | None = None, entry: Seq[float] | None = None, tag: int = 0,
    ) -> list[int]:
        """Drafts of each sequence in this step. ``entry[i]``: seconds before sequence i can draft at all.

        ``tag``: what the offer of a lone sequence depends on besides its rates and length.
        """
        if not self.active or not any(offers):
            return [len(o) for o in offers]
        n = len(seqs)
        if n > 1:
            return self._allot(seqs, paces, offers, width, depths, entry)
        pace = paces[0]
        key = (tag, len(offers[0]), len(seqs[0].tokens).bit_length(), pace.off)
        count = pace.memo.get(key)
        if count and not pace.off:
            return [count]
        if count == 0 and not pace.probing and pace.idle > NOTE_AFTER and pace.idle % PROBE_GAP:
            pace.idle += 1
            self._credit += self._share
            return [0]
        counts = self._allot(seqs, paces, offers, width, depths, entry)
        pace.memo[key] = 0 if pace.off else counts[0]
        return counts

    def _allot(
        self, seqs: Seq[Sequence], paces: Seq[Pace], offers: Seq[Seq[float]], width: int,
        depths: Seq[Seq[int]] | None, entry: Seq[float] | None,
    ) -> list[int]:
        n = len(seqs)
        context = sum(len(s.tokens) for s in seqs) // n
        drafts = sum(map(len, offers))
        target = self.target.table(context, n + width * drafts)
        own = max(0.0, self._own[1].value - self._own[0].value)
        extra = [own] * n
        if entry is not None:
            extra = [own + e / min(32, s.remaining) for e, s in zip(entry, seqs, strict=True)]
        levels = None
        if self.draft is not None:
            scale = self.draft.scale
            levels = [scale * t for t in self.draft.table(context, drafts)[: drafts + 2]]
        counts, _ = allot(
            [[RETURN_MARGIN * g for g in o] if p.off else o for p, o in zip(paces, offers, strict=True)],
            target, fixed=self._between.value, extra=extra, width=width, levels=levels, depths=depths,
        )
        self._share = PROBE_SHARE * target[n] / n
        for i, (pace, offer) in enumerate(zip(paces, offers, strict=True)):
            if counts[i]:
                pace.off, pace.idle, pace.probing = False, 0, 0
            elif offer:
                price = extra[i] + (entry[i] if entry is not None else 0.0)
                counts[i] = self._declined(seqs[i], pace, offer, n, target, levels, price, width)
        return counts

    def _declined(
        self, seq: Sequence, pace: Pace, offer: Seq[float], n: int, target: Seq[float],
        levels: Seq[float] | None, price: float, width: int,
    ) -> int:
        """Count the step; 0, or the length of a probe that the credit pays for."""
        pace.off, pace.idle = True, pace.idle + 1
        self._credit += self._share
        if pace.idle == NOTE_AFTER:
            self._note(seq, offer, n, target, levels, price, width)
        k = min(self._probe, len(offer))
        price += target[n + width * k] - target[n] + (levels[1] * k if levels is not None else 0.0)
        if not pace.probing:
            if pace.idle < PROBE_GAP or self._credit < min(price, 4 * target[1]):
                return 0
            pace.probing = self._patience
        pace.idle = NOTE_AFTER + 1
        self._credit -= price
        return k

    def _note(
        self, seq: Sequence, offer: Seq[float], n: int, target: Seq[float],
        levels: Seq[float] | None, price: float, width: int,
    ) -> None:
        """Say why with the length that would have been best."""
        best, text, gain = 0.0, "", 0.0
        for k, g in enumerate(offer, 1):
            gain += g
            rows = n + width * k
            cost = (price + target[rows] + (levels[1] * k if levels is not None else 0.0)) / target[n]
            if (1 + gain) / cost > best:
                best = (1 + gain) / cost
                text = (
                    f"{1 + gain:.2f} tokens expected for {cost:.2f} times the time of one "
                    f"({width * k + 1} rows, batch {n})"
                )
        seq.metrics.note(f"speculation off: {text}")

    def learn(self, pace: Pace, key: int, hit: float) -> None:
        self.shared.learn(key, hit)
        pace.rates.learn(key, hit)
        pace.memo.clear()

    def judged(self, pace: Pace, keys: Seq[int], accepted: int) -> None:
        """A chain whose first ``accepted`` drafts were right; ``keys`` of all of them."""
        if not keys:
            return
        for key in keys[:accepted]:
            self.learn(pace, key, 1.0)
        if accepted < len(keys):
            self.learn(pace, keys[accepted], 0.0)
        self.probed(pace, accepted)

    def judged_tree(self, pace: Pace, keys: Seq[int], parent: Seq[int], rows: Seq[int]) -> None:
        """A tree of which ``rows`` (with the root, 0) were accepted; ``keys[i]`` belongs to node i + 1."""
        right = set(rows)
        for node, key in enumerate(keys, 1):
            if parent[node] in right:
                self.learn(pace, key, float(node in right))
        self.probed(pace, len(rows) - 1)

    def probed(self, pace: Pace, accepted: int) -> None:
        """A probe that found nothing ends; one that did goes on, and weighs more."""
        if pace.probing:
            pace.probing = self._patience if accepted else pace.probing - 1
            pace.rates.trials = [min(t, 6) for t in pace.rates.trials]
            pace.memo.clear()


class _Typical:
    """A running typical value of a duration: quick to fall, slow to rise, deaf to outliers and to the cold start."""

    __slots__ = ("_left", "value")

    def __init__(self) -> None:
        self.value, self._left = 0.0, 3

    def learn(self, seconds: float) -> None:
        if self._left:
            self._left -= 1
            return
        old = self.value
        if not old:
            self.value = seconds
        elif seconds < old:
            self.value = old + 0.2 * (seconds - old)
        else:
            self.value = old + 0.05 * (min(seconds, 2 * old) - old)
