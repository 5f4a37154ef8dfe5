"""Conformal tests: exact rates, ties, reservoirs, and what a calibration file must refuse."""

import json
import math

import numpy as np
import pytest

from stretto.errors import InputError, OptionError
from stretto.threads.conformal import Calibration, Online, check_alpha, fixed_sequence, p_value, rejects

DRAWS = 100_000


@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("n", [9, 16, 99])
def test_the_rate_of_exchangeable_scores_is_exact(n, alpha):
    rng = np.random.default_rng(n)
    rows = rng.random((DRAWS, n + 1))
    ranks = 1 + (rows[:, :n] >= rows[:, n:]).sum(1)
    want = math.floor(alpha * (n + 1) + 1e-9) / (n + 1)
    rate = np.mean(ranks <= alpha * (n + 1) + 1e-9)
    assert abs(rate - want) <= 3 * math.sqrt(want * (1 - want) / DRAWS)
    for row, rank in zip(rows[:300], ranks[:300], strict=True):  # the function is that definition
        ordered = sorted(row[:n])
        assert p_value(ordered, row[n]) == rank / (n + 1)
        assert rejects(ordered, row[n], alpha) == (rank <= alpha * (n + 1) + 1e-9)


def test_ties_never_raise_the_rate_and_random_breaking_makes_p_uniform():
    rng, n, alpha = np.random.default_rng(1), 9, 0.3
    plain, counts = 0, np.zeros(n + 1)
    for row, u in zip(rng.integers(0, 4, (20_000, n + 1)), rng.random(20_000), strict=True):
        ordered = sorted(map(float, row[:n]))
        plain += rejects(ordered, float(row[n]), alpha)
        counts[round(p_value(ordered, float(row[n]), u) * (n + 1)) - 1] += 1
    assert plain / 20_000 <= alpha
    assert np.abs(counts / 20_000 - 1 / (n + 1)).max() < 4 * math.sqrt(0.09 / 20_000)


def test_limits_of_alpha():
    ordered = [1.0, 2.0, 3.0]
    assert not any(rejects(ordered, s, 0.0) for s in (0.0, 5.0, math.inf, math.nan))
    assert all(rejects(ordered, s, 1.0) for s in (0.0, 2.0, 5.0, math.inf))
    assert rejects(ordered, math.inf, 0.25) and rejects(ordered, math.nan, 0.01)
    for bad in (-0.1, 1.1, math.nan, "x", True):
        with pytest.raises(OptionError, match="alpha"):
            check_alpha(bad)
    check_alpha(1 / 17, 16)
    with pytest.raises(InputError, match=r"alpha \(n \+ 1\).*0\.059"):
        check_alpha(0.05, 16)


def test_fixed_sequence_is_the_worst_part_and_stops_at_the_first_acceptance():
    tester = Calibration({0: [1.0, 2.0, 3.0, 4.0]}, 0.4)
    assert fixed_sequence(tester, [9.0, 0.5, 3.5, math.nan, 2.5], 0) == [3, 0, 2]
    assert fixed_sequence(tester, [9.0, 0.5, 3.5, math.nan, 2.5], 0, most=1) == [3]
    assert fixed_sequence(tester, [0.5, 0.6], 0) == []


def test_an_order_fixed_before_controls_any_false_rejection():
    rng, n, alpha = np.random.default_rng(3), 19, 0.2
    wrong = {"fixed": 0, "by score": 0}
    for _ in range(4000):
        row = rng.random(n + 4)
        calibration = Calibration({0: row[:n]}, alpha)
        wrong["fixed"] += bool(fixed_sequence(calibration, list(row[n:]), 0, order=[2, 0, 3, 1]))
        wrong["by score"] += bool(fixed_sequence(calibration, list(row[n:]), 0))
    assert wrong["fixed"] / 4000 <= alpha + 3 * math.sqrt(0.16 / 4000) < wrong["by score"] / 4000
    with pytest.raises(OptionError, match="order"):
        fixed_sequence(calibration, [1.0, 2.0], 0, order=[0, 0])


def test_the_first_turns_scores_drift_where_each_turns_own_do_not():
    """Later turns draw from another law: one set for all misses alpha, a reservoir for each turn keeps it."""
    rng, alpha, turns = np.random.default_rng(5), 0.4, 4
    draw = lambda t: float(rng.gamma(2.0 + t))
    firsts = Calibration({0: [draw(0) for _ in range(400)]}, alpha, firsts=True)
    online = Online(alpha, window=512)
    hits = {"firsts": np.zeros(turns), "online": np.zeros(turns)}
    questions = 3000
    for q in range(questions):
        for t in range(turns):
            score = draw(t)
            hits["firsts"][t] += firsts.test(score, t).reject
            verdict = online.test(score, t)
            if q >= 32:
                assert verdict.calibrated
                hits["online"][t] += verdict.reject
    error = math.sqrt(alpha * (1 - alpha) / (questions - 32))
    assert np.abs(hits["online"] / (questions - 32) - alpha).max() < 4 * error
    assert hits["firsts"][3] / questions > alpha + 10 * error


def test_online_borrows_and_says_so_then_learns_after_the_decision():
    online = Online(0.5, warm=4, window=6)
    first = [online.test(float(i), 0) for i in range(5)]
    assert [v.calibrated for v in first] == [False] * 4 + [True] and not any(v.reject for v in first[:4])
    assert math.isnan(first[0].p) and first[4].n == 4 and first[4].p == pytest.approx(1 / 5)
    lent = online.test(9.0, 3)
    assert lent.reject and not lent.calibrated and lent.n == 5
    assert online.test(math.inf, 3).reject and online.sizes() == {0: 5, 3: 1}
    for i in range(20):
        online.test(float(i), 0)
    assert online.sizes()[0] == 6 and online.test(14.5, 0).p == pytest.approx(6 / 7)


def test_buckets_by_powers_of_two():
    online = Online(0.5, warm=1, bucket="log")
    for turn in range(8):
        online.test(1.0, turn)
    assert online.sizes() == {0: 1, 1: 2, 2: 4, 3: 1}


def test_the_level_adapts_to_the_rate_without_exchangeability():
    rng, alpha = np.random.default_rng(9), 0.3
    online = Online(alpha, gamma=0.05, window=64)
    plain = Online(alpha, window=64)
    found = {"moved": 0, "fixed": 0}
    for i in range(4000):  # scores that grow for ever: the newest is nearly always the worst
        score = i + 40 * float(rng.random())
        found["moved"] += online.test(score, 0).reject
        found["fixed"] += plain.test(score, 0).reject
    assert abs(found["moved"] / 4000 - alpha) < 0.02 and found["fixed"] / 4000 > 0.5


PRINT = {"draft": "a", "target": "b", "chunk": 32, "template": "c"}


def test_files_come_back_and_refuse_another_setting(tmp_path):
    path = tmp_path / "c.json"
    made = Calibration({0: [3.0, 1.0, 2.0], 2: [5.0, 4.0, 6.0]}, 0.4, PRINT)
    made.save(path)
    back = Calibration.load(path, 0.4, PRINT)
    assert back.scores == made.scores == {0: [1.0, 2.0, 3.0], 2: [4.0, 5.0, 6.0]}
    assert back.test(4.5, 2).calibrated and not back.test(4.5, 7).calibrated and back.test(4.5, 7).n == 3
    assert Calibration.load(path, 0.4, PRINT, firsts=True).test(2.5, 9).p == 2 / 4
    for key, other in (("draft", "z"), ("target", "z"), ("chunk", 16), ("template", "z")):
        with pytest.raises(InputError, match=f"{key}.*{other}"):
            Calibration.load(path, 0.4, PRINT | {key: other})


@pytest.mark.parametrize("content, match", [
    ("", "no calibration file"), ("[1]", "no calibration file"), ('{"scores": {}}', "fingerprint"),
    ({"fingerprint": PRINT, "scores": {}}, "without scores"), ({"fingerprint": PRINT, "scores": {"0": []}}, "without"),
    ({"fingerprint": PRINT, "scores": {"0": [1.0, float("nan"), 2.0]}}, "nan"),
    ({"fingerprint": PRINT, "scores": {"0": [1.0, float("inf"), 2.0]}}, "inf"),
    ({"fingerprint": PRINT, "scores": {"0": [1.0, "x"]}}, "no numbers"),
    ({"fingerprint": PRINT, "scores": {"0": [1.0]}}, r"alpha \(n \+ 1\)"),
])
def test_unusable_files_are_refused(tmp_path, content, match):
    path = tmp_path / "c.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=match):
        Calibration.load(path, 0.4, PRINT)


def test_options_of_reservoirs():
    for bad in ({"alpha": 2.0}, {"bucket": "x"}, {"warm": 0}, {"warm": 600}, {"gamma": 1.0}):
        with pytest.raises(OptionError):
            Online(**{"alpha": 0.4} | bad)
    with pytest.raises(InputError, match=r"alpha \(n \+ 1\)"):
        Online(0.01)
