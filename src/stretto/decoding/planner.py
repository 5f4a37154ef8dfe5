"""The planner: how many tokens to draft, from live acceptance and the measured cost of rows.

A step over B sequences that drafts K tokens is worth (B + sum of their path products) / (t_fixed + t_draft + t(B + K))
tokens a second. Drafts are taken in the order of their products, whosever they are (water-filling), as long as the
best value lies ahead; K = 0 is among the choices and costs nothing: where it is chosen the method rests, which is plain
decoding. A bank keeps it honest (``bank.py``): every step with drafts is booked by the wall clock against the plain
steps that its tokens would have taken, and one per cent of all time comes on top. While it is overdrawn the method
rests, so that it never loses more than that one per cent, whatever its rates promise.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from stretto.decoding.bank import Bank
from stretto.decoding.costs import Costs, Rates, Typical, allot
from stretto.decoding.verify import choose
from stretto.engine.host import Host
from stretto.engine.runner import Runner
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.errors import CapacityError

__all__ = ["Costs", "Pace", "Planner", "Rates", "allot", "rested", "room"]

OWN_HORIZON, SHARED_HORIZON = 24, 96  # trials that the averages remember
FIRST_TRIALS = 1  # what a method's prior counts for
PRIOR_TRIALS = 4  # what the shared rates count for at most in a new sequence
PROBE_GAP = 16  # steps of one sequence between two probes
REST = 32  # steps of a sequence that is switched off between two looks at offers that do not change
DECLINES, AGAIN = 8, 3  # looks in vain in a row, whosever, before all rest; after a nap
NAP, LONGEST_NAP = 32, 512  # steps of naps, which double
REPLAN = 4  # drafted steps between two decisions on the same offer
SAMPLE = 8  # steps to one whose overhead is looked at
ROOT, RESTED = range(1), "rested"
NOTE_AFTER = 4  # declined steps in a row before the result says so
MARGIN = 1.03  # what drafting must promise at least, in tokens per second of plain decoding
RETURN_MARGIN = 0.9  # hysteresis: gains of a sequence that is switched off count this much


def rested(seqs: Seq[Sequence], steps: Seq[Step], outcomes: Seq[Outcome]) -> list[Commit] | None:
    """The commits for steps made by ``Planner.rest``; None for others."""
    if steps[0].extra is not RESTED:
        return None
    return [
        Commit([choose(seq, outcome, 0)], keep=ROOT, logprob_rows=ROOT)
        for seq, outcome in zip(seqs, outcomes, strict=True)
    ]


def room(seq: Sequence) -> int:
    """How many drafted tokens the sequence can use now: rows it may have, tokens max_tokens still allows."""
    return max(0, min(seq.row_limit, seq.remaining) - 1)


@dataclass(slots=True)
class Pace:
    """What the planner knows of one sequence."""

    rates: Rates
    off: bool = False
    rest: int = 0  # steps for which it does not even make an offer
    idle: int = 0  # declined steps in a row
    waited: int = 0  # declined steps since the last probe
    probing: int = 0  # steps that the probe under way may go on without a hit
    memo: dict[tuple, int] = field(default_factory=dict)  # drafts, for REPLAN steps
    age: int = 0
    noted: bool = False


class Planner:
    """One per method instance: shared rates, the target's costs, the method's own time.

    ``prior``: the rates to start from, by key; keys are the method's. With ``host.plan`` false every offer is taken.
    ``probe``: most drafts of a probe; ``patience``: steps that a probe may take until its first hit; ``steady``:
    whether a declined offer says that the next one will be declined too, so that the method may sleep.
    """

    def __init__(
        self, host: Host, prior: Seq[float], *, draft: Runner | None = None, probe: int = 2, patience: int = 1,
        steady: bool = True,
    ):
        self.shared = Rates(prior, [FIRST_TRIALS] * len(prior), SHARED_HORIZON)
        self.active, self._probe, self._patience, self._steady = host.plan, probe, patience, steady
        self._note_after = NOTE_AFTER if steady else 8 * NOTE_AFTER
        self.target = self.draft = None
        if host.plan:
            try:
                self.target = Costs(host.runner)
                self.draft = Costs(draft) if draft is not None else None
            except CapacityError as e:
                self.active = False
                host.notes.append(f"drafting by fixed lengths: {e}")
        self.bank = Bank(self.target, patience) if self.target is not None else None
        self._own = Typical()  # seconds per sequence of a step with drafts
        self._between = Typical()  # seconds from a commit to the next propose
        self._around = Typical()  # from propose to commit, without the forward by its curve
        self._table: list[float] | None = None  # the curve used last
        self._longest = self.target.one if self.target is not None else 0.0  # more is waiting, not work
        self._spent = self._begun = self._paused = self._ended = 0.0
        self._tick = 0
        self._vain, self._nap, self._next_nap = 0, 0, NAP  # looks in vain in a row; steps to rest now, and next time
        self._unprobed = 0  # steps of any sequence since the last probe
        self._why = "no offer was worth its rows"  # the last reason given
        self.level = self.row = 0.0  # tokens that the time of a draft's forward, of a row would give elsewhere

    def pace(self) -> Pace:
        trials = [min(t, PRIOR_TRIALS) for t in self.shared.trials]
        return Pace(Rates(self.shared.rate, trials, OWN_HORIZON))

    @property
    def overhead(self) -> float:
        """Seconds of a step with drafts beside its forward; 0 until it is known."""
        return max(0.0, self._between.value) + self._own.value + max(0.0, self._around.value)

    @property
    def napping(self) -> bool:
        """Whether the next step will be plain decoding, whatever it is."""
        return self._nap > 0

    def begin(self) -> float:
        """Call first in propose; the moment, for ``pause``. Times are looked at in one step of SAMPLE."""
        now = time.perf_counter()
        self._tick += 1
        if self._ended and self._tick % SAMPLE == 0:
            self._between.learn(min(now - self._ended, self._longest))
        return now

    def pause(self, start: float, without: float = 0.0) -> None:
        """Call last in propose; ``without``: seconds of forwards in between."""
        self._begun, self._paused = start, time.perf_counter()
        self._spent = self._paused - start - without

    def once(self, seconds: float) -> None:
        """What this step took for the benefit of many others (plans, tables): it is not the step's."""
        if self.bank is not None:
            self.bank.spare(seconds)

    def end(self, start: float, sequences: int, drafted: int) -> None:
        """Call last in commit; ``start``: when it began, ``drafted``: rows beyond one for each sequence."""
        self._ended = now = time.perf_counter()
        if not drafted:
            return
        self._own.learn((self._spent + now - start) / sequences)
        if self._table is not None and sequences + drafted < len(self._table):
            forward = self._table[sequences + drafted]
            self._around.learn(start - self._paused - forward)
            self.bank.expect(forward + self._paused - self._begun + now - start)

    def rest(self, seqs: Seq[Sequence], paces: Seq[Pace]) -> list[Step] | None:
        """Call before anything else in propose: the steps of plain decoding where nobody shall draft now.

        ``rested`` then makes the commits. None: go on, and ask ``asleep`` for each sequence.
        """
        if not self.active:
            return None
        if self._nap > 0:
            self._nap -= len(paces)
            self._unprobed += len(paces)
            for seq, pace in zip(seqs, paces, strict=True):
                if not pace.noted:
                    pace.noted = True
                    seq.metrics.note(f"speculation off: it did not pay before ({self._why})")
            return [Step([seq.tokens[-1]], extra=RESTED) for seq in seqs]
        bank, n = self.bank, len(seqs)
        bank.settle(seqs)
        if bank.open(n):
            for pace in paces:
                if pace.rest <= 0:
                    bank.enter(plain=False)
                    return None
        elif bank.debt:
            self._why = "by the clock its steps took longer than plain ones for the tokens that they won"
            self._sleep(min(bank.debt, REST))
        bank.enter(plain=True)
        self._unprobed += n
        for pace in paces:
            pace.rest -= 1
            pace.waited += 1
        self._ended = 0.0
        return [Step([seq.tokens[-1]], extra=RESTED) for seq in seqs]

    def _sleep(self, steps: int) -> None:
        """Plain decoding for so many steps of whatever sequences, without a look at anything."""
        self._nap, self._ended = steps, 0.0
        self.bank.slept(steps)

    def asleep(self, seq: Sequence, pace: Pace) -> bool:
        """Whether the method is switched off for this step of ``seq`` and need not even make an offer."""
        if pace.rest <= 0:
            return False
        pace.rest -= 1
        pace.waited += 1
        return True

    def allot(
        self, seqs: Seq[Sequence], paces: Seq[Pace], offers: Seq[Seq[float]], *, width: int = 1,
        depths: Seq[Seq[int]] | None = None, entry: Seq[float] | None = None, tag: Hashable = None,
    ) -> list[int]:
        """Drafts of each sequence in this step. ``entry[i]``: seconds before sequence i can draft at all.

        ``tag``: what the offer of a lone sequence depends on besides its rates and length.
        """
        if not self.active:
            return [len(o) for o in offers]
        if not any(offers):
            self._in_vain()
            return [0] * len(seqs)
        if len(seqs) > 1:
            return self._allot(seqs, paces, offers, width, depths, entry)
        pace = paces[0]
        key = (tag, len(offers[0]), len(seqs[0].tokens).bit_length(), pace.off)
        count = pace.memo.get(key)
        if count and not pace.off:
            return [count]
        idle = pace.idle + 1
        if count == 0 and not pace.probing and idle != self._note_after and pace.waited < PROBE_GAP:
            pace.idle = idle
            pace.waited += 1
            self._in_vain()
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
        self._table = target
        fixed = self.bank.overhead(n)
        own = max(0.0, n * self._own.value + self._around.value + self._between.value - fixed) / n
        extra = [own] * n
        if entry is not None:
            extra = [own + e / min(32, s.remaining) for e, s in zip(entry, seqs, strict=True)]
        levels = None
        if self.draft is not None:
            scale = self.draft.scale
            levels = [scale * t for t in self.draft.table(context, drafts)[: drafts + 2]]
        counts, rate = allot(
            [[RETURN_MARGIN * g for g in o] if p.off else o for p, o in zip(paces, offers, strict=True)],
            target, fixed=max(0.0, fixed), extra=extra, width=width,
            levels=levels, depths=depths, margin=MARGIN,
        )
        self.level = rate * levels[1] if levels is not None else 0.0
        self.row = rate * (target[n + width * drafts] - target[n]) / drafts
        for i, (pace, offer) in enumerate(zip(paces, offers, strict=True)):
            if counts[i]:
                pace.off, pace.idle, pace.probing = False, 0, 0
            elif offer:
                counts[i] = self._declined(seqs[i], pace, offer, n, target, levels, extra[i], width)
        return counts

    def _rows(self, count: int, n: int, target: Seq[float], levels: Seq[float] | None, width: int) -> float:
        """Seconds that ``count`` drafts of one sequence add to a forward over ``n`` sequences."""
        return target[n + width * count] - target[n] + (levels[1] * count if levels is not None else 0.0)

    def _declined(
        self, seq: Sequence, pace: Pace, offer: Seq[float], n: int, target: Seq[float],
        levels: Seq[float] | None, start: float, width: int,
    ) -> int:
        """Count the step; 0, or the length of a probe that the bank can pay."""
        pace.off, pace.idle, pace.waited = True, pace.idle + 1, pace.waited + 1
        if pace.idle == self._note_after and not pace.noted:
            pace.noted = True
            self._note(seq, offer, n, target, levels, start, width)
        k = min(self._probe, len(offer))
        if not pace.probing:
            waited = max(pace.waited, self._unprobed)
            if waited < PROBE_GAP or self.bank.balance < start + self._rows(k, n, target, levels, width):
                if self._steady and pace.idle >= self._note_after:
                    pace.rest = REST
                self._in_vain()
                return 0
            pace.probing = self._patience
        pace.waited = self._unprobed = 0
        return k

    def _in_vain(self) -> None:
        """A look that came to nothing. Many in a row, also of different sequences, and the method naps: texts may be
        too short for each of them to find out anew what all the others did."""
        self._vain += 1
        if self._steady and self._vain >= (DECLINES if self._next_nap == NAP else AGAIN):
            self._vain = 0
            self._sleep(self._next_nap)
            self._next_nap = min(2 * self._next_nap, LONGEST_NAP)

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
        self._why = text
        seq.metrics.note(f"speculation off at output token {seq.generated}: {text}")

    def learn(self, pace: Pace, key: int, hit: float) -> None:
        self.shared.learn(key, hit)
        pace.rates.learn(key, hit)
        self._changed(pace)

    def judged(self, pace: Pace, keys: Seq[int], accepted: int, beyond: Seq[int] = ()) -> None:
        """A chain whose first ``accepted`` drafts were right. ``keys`` of all of them; ``beyond``: those of
        depths that might have been drafted and were not."""
        if not keys:
            return
        for rates in (self.shared, pace.rates):
            rates.learn_chain(keys, accepted)
            rates.fade(beyond)
        self._changed(pace)
        self.probed(pace, accepted)

    def judged_tree(
        self, pace: Pace, keys: Seq[int], parent: Seq[int], rows: Seq[int], beyond: Seq[int] = (),
    ) -> None:
        """A tree of which ``rows`` (with the root, 0) were accepted; ``keys[i]`` belongs to node i + 1."""
        right = set(rows)
        self.shared.fade(beyond)
        pace.rates.fade(beyond)
        for node, key in enumerate(keys, 1):
            if parent[node] in right:
                hit = float(node in right)
                self.shared.learn(key, hit)
                pace.rates.learn(key, hit)
        self._changed(pace)
        self.probed(pace, len(rows) - 1)

    def _changed(self, pace: Pace) -> None:
        """Decisions are thought over anew every few steps."""
        pace.age += 1
        if pace.age >= REPLAN:
            pace.age = 0
            pace.memo.clear()

    def probed(self, pace: Pace, accepted: int) -> None:
        """Settle a step with drafts. A probe that found nothing ends; one that did goes on, and weighs more."""
        if accepted:
            self._vain, self._next_nap = 0, NAP
        if pace.probing:
            pace.probing = self._patience if accepted else pace.probing - 1
            pace.rates.trials = [min(t, 6) for t in pace.rates.trials]
            pace.memo.clear()
