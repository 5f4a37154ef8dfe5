"""Whether drafting pays by the wall clock: an account of the time that it won or lost against plain decoding.

The account is in seconds. Plain decoding of the same tokens would have taken so many plain steps; a plain step is the
measured curve at this context and what plain steps take besides (Python, sampling, text), which is seen in steps of
plain decoding themselves: from the start of one to the start of the next, without prompts in them. A method begins
with a few of those, and looks again once in a while. So whatever a step with drafts takes, by caches, threads or the
method's own time, is in the account, whether or not the planner's model knows of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as Seq
from operator import is_
from statistics import median

from stretto.decoding.costs import Costs
from stretto.engine.types import Sequence

__all__ = ["ALLOWANCE", "START", "WEALTH", "Bank", "Overhead"]

ALLOWANCE = 0.01  # of the time of plain decoding: what looking for gains may cost
WEALTH = 24  # plain steps that the bank holds at most: what may be lost where a text changes for the worse
START = 4  # plain steps in the bank at first: enough for some probes of a method that nothing is known of
DEBT = 8  # plain steps that it may owe: more is forgiven, for on a busy machine it was not the method
LOOKS, AGAIN = 8, 4  # plain steps looked at first, and later
GAP, LONGEST_GAP = 32, 256  # steps with drafts between looks: at first, and in the end
HORIZON = 64  # plain steps that the mean remembers
CLIP = 3.0  # a step that takes so many times what it should was waiting, not work


class Overhead:
    """Mean seconds of a plain step beside its forward by the curve.

    A machine may be busy just when it is looked at: a value far above the mean is cut, one far below ends the mean's
    memory."""

    __slots__ = ("_count", "_due", "_first", "_gap", "looks", "value")

    def __init__(self) -> None:
        self.value, self.looks = 0.0, LOOKS  # looks: how many plain steps are wanted now
        self._count, self._gap, self._due = 0, GAP, GAP
        self._first: list[float] = []

    def learn(self, seconds: float, forward: float) -> None:
        """A plain step that took ``seconds``, of which its forward should take ``forward``."""
        self.looks = max(0, self.looks - 1)
        beside = seconds - forward
        if len(self._first) < LOOKS:
            self._count += 1
            self._first.append(beside)
            self.value = median(self._first)
            return
        expected = forward + self.value
        self._count = 2 if 2.0 * seconds < expected else min(self._count + 1, HORIZON)
        self.value += (min(beside, CLIP * expected - forward) - self.value) / self._count

    def drafted(self) -> None:
        """A step with drafts; every so many of them plain ones are looked at anew."""
        self._due -= 1
        if self._due <= 0:
            self._gap = min(2 * self._gap, LONGEST_GAP)
            self._due, self.looks = self._gap, AGAIN


class Bank:
    """The account of one method. ``target``: what forwards of the target cost; ``patience``: steps with drafts that
    may follow each other before the account is looked at, where the first ones only prepare the next."""

    def __init__(self, target: Costs, patience: int = 1):
        self._target, self._patience, self._run = target, patience, 0
        self._overheads: dict[int, Overhead] = {}  # by the bits of the number of sequences; for each of them
        self.balance = START * target.one
        self._expected = 0.0  # seconds that the step should take, where its method said so
        self._last = target.one  # seconds of a plain step of one sequence, lately
        self._started = 0.0  # when the step that is not settled yet began; 0: there is none
        self._seqs: Seq[Sequence] = ()
        self._tokens = 0
        self._plain = True  # whether that step is one of plain decoding

    def overhead(self, n: int) -> float:
        """Seconds of a plain step over ``n`` sequences, beside its forward."""
        return n * self._of(n).value

    def open(self, n: int) -> bool:
        """Whether a method may draft for ``n`` sequences now, or look whether it would."""
        return (self.balance >= 0.0 or 0 < self._run < self._patience) and not self._of(n).looks

    @property
    def debt(self) -> int:
        """Steps of plain decoding until the account is even, 0 if it is."""
        return math.ceil(-self.balance / (ALLOWANCE * self._last)) if self.balance < 0.0 else 0

    def slept(self, steps: int) -> None:
        """Plain decoding for ``steps`` from now on, which nobody looks at."""
        self._started, self._run = 0.0, 0
        self._earn(ALLOWANCE * steps * self._last, self._last)

    def settle(self, seqs: Seq[Sequence]) -> None:
        """Call first in every propose: book the step that ends now."""
        now = time.perf_counter()
        tokens = 0
        clean = True
        for seq in seqs:
            tokens += len(seq.tokens)
            clean = clean and seq.computed == len(seq.view)
        if self._started and clean and len(seqs) == len(self._seqs) and all(map(is_, seqs, self._seqs)):
            self._book(now - self._started, tokens - self._tokens, tokens)
        self._started = now if clean else 0.0
        self._seqs, self._tokens = seqs, tokens

    def enter(self, plain: bool) -> None:
        """Say what the step is that ``settle`` began."""
        self._plain, self._expected = plain, 0.0
        self._run = 0 if plain else self._run + 1
        if not plain:
            self._of(len(self._seqs)).drafted()

    def spare(self, seconds: float) -> None:
        """Do not book so much of the step that is under way."""
        if self._started:
            self._started += seconds

    def expect(self, seconds: float) -> None:
        """What the method took for the step that ends, and its forward should take."""
        self._expected = seconds

    def _of(self, n: int) -> Overhead:
        bits = n.bit_length()
        if bits not in self._overheads:
            self._overheads[bits] = Overhead()
        return self._overheads[bits]

    def _book(self, seconds: float, made: int, context: int) -> None:
        n = len(self._seqs)
        forward = self._target.table(context // n, n)[n]
        seen = self._of(n)
        plain = self._last = forward / n + seen.value
        if self._plain:
            if made == n:
                seen.learn(seconds / n, forward / n)
            self._earn(ALLOWANCE * made * plain, plain)
        elif made:
            most = CLIP * (max(self._expected, forward) + n * seen.value)
            self._earn((1 + ALLOWANCE) * made * plain - min(seconds, max(most, made * plain)), plain)

    def _earn(self, seconds: float, plain: float) -> None:
        self.balance = max(-DEBT * plain, min(self.balance + seconds, WEALTH * plain))
