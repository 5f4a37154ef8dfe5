"""The planner's bank: what speculation may cost, and that it stays on where it pays. Chains that grow in C."""

import copy
import time
from types import SimpleNamespace

import numpy as np
import pytest

import tiny
from stretto.decoding.bank import ALLOWANCE, LONGEST_GAP, LOOKS, START, WEALTH, Overhead
from stretto.decoding.planner import Planner, rested
from stretto.engine.runner import LatencyCurve, Runner
from stretto.models.batch import Doubt
from stretto.models.native import NativeForward

ROWS = [1, 2, 4, 8, 16, 32, 64]


def a_planner(seconds, **options) -> Planner:
    """On a machine whose forward of n rows takes ``seconds[i]`` at ROWS[i]; the method's own time is next to nothing."""
    runner = SimpleNamespace(curve=lambda context: LatencyCurve(ROWS, seconds))
    return Planner(SimpleNamespace(runner=runner, plan=True, notes=[]), [0.9] * 8, **options)  # type: ignore[arg-type]


def a_sequence():
    note = SimpleNamespace(note=lambda text: None)
    return SimpleNamespace(
        id=0, tokens=[1] * 100, generated=50, remaining=10**6, metrics=note, view=range(99), computed=99
    )


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self, monkeypatch):
        self.now = 1.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def decode(planner, clock, steps, right, *, beside=0.0, hidden=0.0, sequences=1) -> tuple[float, float]:
    """(seconds of all steps, of the plain steps that give as many tokens): ``right`` of the drafts of a step are right.

    ``beside``: seconds of every step beside its forward; ``hidden``: of a step with drafts, where no model sees them.
    """
    seqs = [a_sequence() for _ in range(sequences)]
    paces = [planner.pace() for _ in seqs]
    table, start, plain = planner.target.table(100, 64), clock.now, 0.0
    for _ in range(steps):
        counts = [0] * sequences
        for seq in seqs:
            seq.view, seq.computed = range(len(seq.tokens) - 1), len(seq.tokens) - 1
        if planner.rest(seqs, paces) is None:
            begun = planner.begin()
            offers = [[] if planner.asleep(s, p) else p.rates.gains(range(8)) for s, p in zip(seqs, paces)]
            counts = planner.allot(seqs, paces, offers)
            planner.pause(begun)
            clock.now += table[sequences + sum(counts)]
            for pace, count in zip(paces, counts):
                if count:
                    planner.judged(pace, range(count), min(right, count))
            planner.end(clock.now, sequences, sum(counts))
        else:
            clock.now += table[sequences]
        clock.now += beside + (hidden if any(counts) else 0.0)
        for seq, count in zip(seqs, counts):
            seq.tokens += [1] * (1 + min(right, count))
        plain += (table[sequences] + beside) * sum(1 + min(right, c) for c in counts) / sequences
    return clock.now - start, plain


def wealth(planner, beside=0.0) -> float:
    return WEALTH * (planner.target.table(100, 1)[1] + beside)


@pytest.mark.parametrize("dear", [1.05, 1.5, 3.0])
@pytest.mark.parametrize("beside", [0.0, 0.02])
def test_drafts_that_are_never_right_cost_what_the_bank_held_and_one_per_cent(dear, beside, clock):
    planner = a_planner([0.02 * dear ** np.log2(n) for n in ROWS])
    seconds, plain = decode(planner, clock, 4000, right=0, beside=beside)
    assert seconds <= plain * (1 + ALLOWANCE) + (START + 3) * (0.02 + beside)
    assert planner.bank.balance <= wealth(planner, beside) * 1.001


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_cost_that_no_model_sees_switches_a_method_off(sequences, clock):
    """A draft of each step is right, and yet the method loses: what goes on around the step, only the clock sees."""
    planner = a_planner([0.02, 0.0201, 0.0202, 0.0204, 0.0208, 0.0216, 0.0232])
    seconds, plain = decode(planner, clock, 6000, right=1, hidden=0.03, sequences=sequences)
    assert seconds <= plain * (1 + 2 * ALLOWANCE) + 30 * 0.02


def test_a_rich_method_that_turns_bad_loses_its_wealth_and_no_more(clock):
    planner = a_planner([0.02, 0.021, 0.022, 0.025, 0.04, 0.08, 0.16])
    decode(planner, clock, 100, right=8)
    assert planner.bank.balance == pytest.approx(wealth(planner), rel=0.05)
    seconds, plain = decode(planner, clock, 2000, right=0)
    assert seconds <= plain * (1 + ALLOWANCE) + (WEALTH + 3) * 0.021


def test_drafts_that_are_right_are_made_in_nearly_every_step(clock):
    planner = a_planner([0.02, 0.021, 0.022, 0.025, 0.04, 0.08, 0.16])
    decode(planner, clock, LOOKS + 1, right=8)
    seconds, plain = decode(planner, clock, 4 * LONGEST_GAP, right=8)
    assert plain > 5.5 * seconds


def test_a_busy_moment_at_the_first_look_is_forgotten_soon():
    overhead = Overhead()
    for _ in range(LOOKS):
        overhead.learn(8.0, 0.2)
    assert overhead.value == pytest.approx(7.8) and not overhead.looks
    for _ in range(20):
        overhead.learn(0.3, 0.2)
    assert overhead.value == pytest.approx(0.1, rel=0.5)
    overhead.learn(9.0, 0.2)
    assert overhead.value < 0.3


def test_steps_with_prompts_in_them_and_of_other_sequences_are_not_booked(clock):
    planner = a_planner([0.02] * len(ROWS))
    seq, pace = a_sequence(), planner.pace()
    for computed in (99, 120, 99):
        seq.computed = computed
        planner.rest([seq], [pace])
        clock.now += 5.0
    planner.rest([a_sequence()], [pace])
    assert planner.bank.overhead(1) == 0.0 and planner.bank.balance == START * 0.02


def test_resting_is_plain_decoding(clock):
    planner = a_planner([0.02] * len(ROWS))
    planner.bank.balance = -1.0
    seqs, paces = [a_sequence(), a_sequence()], [planner.pace(), planner.pace()]
    steps = planner.rest(seqs, paces)
    assert steps is not None and [list(s.tokens) for s in steps] == [[1], [1]]
    seq = SimpleNamespace(sampler=SimpleNamespace(plain=True))
    (commit,) = rested([seq], steps[:1], [SimpleNamespace(argmax=np.array([7]))])  # type: ignore[arg-type]
    assert (list(commit.tokens), commit.keep, commit.drafted) == ([7], range(1), 0)
    steps[0].extra = None
    assert rested([seq], steps[:1], []) is None  # type: ignore[arg-type]


@pytest.mark.skipif(NativeForward.supported(tiny.config()) is not None, reason="no native forward here")
@pytest.mark.parametrize("doubt", [None, Doubt((0.2, 0.4, 0.6), (0.5, 0.7, 0.9, 0.95), 1.0, 0.05),
                                   Doubt((0.3,), (0.5, 0.9), 0.8, 0.3)])  # fmt: skip
def test_a_chain_in_c_is_the_chain_in_python(doubt):
    net, found = tiny.model(), []
    for backend in ("native", "torch"):
        runner = Runner(copy.deepcopy(net), slots=256, backend=backend, deterministic=True)
        slots = runner.alloc.alloc(60)[::-1].copy()
        first = runner.chain(slots[:0], [5, 9, 7], 0, slots[:14], doubt)
        behind = runner.chain(slots[:3], first[0][:1], 3, slots[20:26], doubt)
        found.append((first, behind))
        assert len(first[0]) <= 12 and len(first[1]) == (len(first[0]) if doubt else 0)
        assert behind[0][0] == first[0][1] if len(first[0]) > 1 else True
    assert found[0] == found[1]
