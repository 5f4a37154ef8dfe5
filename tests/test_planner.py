"""The planner's bank: what speculation may cost, and that it stays on where it pays. Chains that grow in C."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest

import tiny
from stretto.decoding.planner import ALLOWANCE, START, WEALTH, Planner, rested
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
    return SimpleNamespace(tokens=[1] * 100, generated=50, remaining=1000, metrics=note)


def decode(planner, steps, right) -> tuple[float, float]:
    """(seconds of all forwards, plain steps that gave as many tokens): ``right`` of the drafts of a step are right."""
    seq, pace = a_sequence(), planner.pace()
    table, seconds, tokens = planner.target.table(100, 16), 0.0, 0
    for _ in range(steps):
        count = 0
        if planner.rest([seq], [pace]) is None:
            offer = [] if planner.asleep(seq, pace) else pace.rates.gains(range(8))
            (count,) = planner.allot([seq], [pace], [offer])
            if count:
                planner.judged(pace, range(count), min(right, count))
        seconds += table[1 + count]
        tokens += 1 + min(right, count)
    return seconds, tokens * table[1]


@pytest.mark.parametrize("dear", [1.05, 1.5, 3.0])
def test_drafts_that_are_never_right_cost_what_the_bank_held_and_one_per_cent(dear):
    planner = a_planner([0.02 * dear ** np.log2(n) for n in ROWS])
    seconds, plain = decode(planner, 4000, right=0)
    assert seconds <= plain * (1 + ALLOWANCE) + (START + 3) * planner._plain
    assert planner.bank <= WEALTH * planner._plain


def test_a_rich_method_that_turns_bad_loses_its_wealth_and_no_more():
    planner = a_planner([0.02, 0.021, 0.022, 0.025, 0.04, 0.08, 0.16])
    decode(planner, 100, right=8)
    assert planner.bank == pytest.approx(WEALTH * planner._plain)
    seconds, plain = decode(planner, 2000, right=0)
    assert seconds <= plain * (1 + ALLOWANCE) + (WEALTH + 3) * planner._plain


def test_drafts_that_are_right_are_made_in_every_step():
    planner = a_planner([0.02, 0.021, 0.022, 0.025, 0.04, 0.08, 0.16])
    seconds, plain = decode(planner, 200, right=8)
    assert plain > 6 * seconds


def test_resting_is_plain_decoding():
    planner = a_planner([0.02] * len(ROWS))
    planner.bank = -1.0
    seqs, paces = [a_sequence(), a_sequence()], [planner.pace(), planner.pace()]
    steps = planner.rest(seqs, paces)
    assert steps is not None and [list(s.tokens) for s in steps] == [[1], [1]]
    before = planner.bank
    planner.rest(seqs, paces)
    assert planner.bank == pytest.approx(before + 2 * ALLOWANCE * planner._plain)
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
