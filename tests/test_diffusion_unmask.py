"""Unmasking rules against brute force, candidates against their law, credit against a matrix."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.decoding import unmask
from stretto.decoding.unmask import Candidates, Credit, candidates, draw, quota, score, select
from stretto.engine.params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
GRID = st.integers(0, 64).map(lambda i: i / 64)  # sums of these are exact, and ties are common
COLUMNS = st.integers(1, 9).flatmap(
    lambda n: st.tuples(*[st.lists(GRID, min_size=n, max_size=n)] * 3)
)


def make(confidence, entropy=None, margin=None):
    n = len(confidence)
    columns = [np.array(x or [0.0] * n) for x in (confidence, margin, entropy)]
    return Candidates(np.arange(n), *columns)


def picked(mask):
    return set(np.flatnonzero(mask).tolist())


@settings(max_examples=80, deadline=None)
@given(COLUMNS, st.integers(1, 9))
def test_best_k_leaves_no_better_one_behind(columns, k):
    c = columns[0]
    got = picked(unmask.take_best(np.array(c), k))
    assert len(got) == min(k, len(c))
    for i, j in itertools.product(got, set(range(len(c))) - got):
        assert c[i] > c[j] or (c[i] == c[j] and i < j)


@settings(max_examples=80, deadline=None)
@given(COLUMNS, st.sampled_from([0.25, 0.5, 1.0, 1.5]))
def test_factor_is_the_largest_n_of_its_definition(columns, f):
    c = columns[0]
    order = sorted(range(len(c)), key=lambda i: (-c[i], i))
    n = 0
    while n < len(c) and all(c[order[j - 1]] >= 1 - f / (j + 1) for j in range(1, n + 2)):
        n += 1
    assert picked(unmask.take_factor(np.array(c), f)) == set(order[:n])


@settings(max_examples=80, deadline=None)
@given(COLUMNS, GRID)
def test_entropy_bound_is_the_largest_prefix_of_its_definition(columns, gamma):
    h = columns[0]
    order = sorted(range(len(h)), key=lambda i: (h[i], i))
    sets = [order[:n] for n in range(1, len(h) + 1)]
    best = [s for s in sets if sum(h[i] for i in s) - max(h[i] for i in s) <= gamma][-1]
    assert picked(unmask.take_bounded(np.array(h), gamma)) == set(best)


@settings(max_examples=80, deadline=None)
@given(COLUMNS, GRID, GRID, st.integers(1, 9), st.lists(st.integers(1, 3), min_size=9, max_size=9))
def test_dynamic_and_runs_follow_their_definitions(columns, tau, low, k, gaps):
    c, s, _ = (np.array(x) for x in columns)
    above = {i for i in range(len(c)) if c[i] > tau}
    want = above if len(above) >= k else picked(unmask.take_best(s, k))
    assert picked(unmask.take_dynamic(c, s, tau, k)) == want
    positions = np.cumsum(gaps[: len(c)]).tolist()
    runs: list[list[int]] = []
    for i, at in enumerate(positions):
        if i and at == positions[i - 1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    best = {min(run, key=lambda i: (-c[i], i)) for run in runs}
    want = {i for i in range(len(c)) if c[i] >= tau or (i in best and c[i] >= low)}
    assert picked(unmask.take_runs(c, positions, low, tau)) == want


@settings(max_examples=80, deadline=None)
@given(COLUMNS, st.sampled_from(unmask.RULES), st.sampled_from(unmask.SCORES), st.integers(0, 511))
def test_at_least_one_position_and_held_ones_last(columns, rule, name, bits):
    confidence, entropy, margin = columns
    n = len(confidence)
    held = np.array([bits >> i & 1 for i in range(n)], bool)
    c = make(confidence, entropy, margin).held_back(held)
    s = score(name, c, np.linspace(0.9, 0.1, n))
    dial = unmask.DIALS.get(rule, 0.0)
    got = picked(select(rule, c, s, list(range(n)), dial=dial, k=2, final=np.linspace(-0.5, 0.5, n)))
    assert got
    if held.all():
        assert got == {0}
    else:
        assert not got & picked(held)


def test_nothing_trusted_takes_the_best_score_and_ties_the_lowest_position():
    c = make([0.25, 0.5, 0.5], entropy=[1.0, 0.25, 0.5], margin=[0.5, 0.125, 0.125])
    best = {"confidence": 1, "margin": 0, "neg_entropy": 1, "position": 0, "random": 2}
    for name, want in best.items():
        s = score(name, c, np.array([0.1, 0.2, 0.3]))
        assert picked(select("threshold", c, s, [0, 1, 2], dial=1.01, k=1)) == {want}


@pytest.mark.parametrize(
    "n, steps, want", [(7, 3, [3, 2, 2]), (2, 4, [1] * 4), (5, None, [1] * 5), (8, 2, [4, 4])]
)
def test_quota(n, steps, want):
    assert [quota(n, steps, s) for s in range(len(want))] == want


def test_candidates_judge_by_the_law_they_come_from():
    torch.manual_seed(0)
    logits = torch.randn(5, 11)
    got = candidates(logits, GREEDY, margin=True, entropy=True)
    for i in range(5):
        p = torch.softmax(logits[i].double(), 0)
        top = p.sort(descending=True).values
        assert got.tokens[i] == int(p.argmax())
        assert got.confidence[i] == pytest.approx(float(top[0]), abs=1e-6)
        assert got.margin[i] == pytest.approx(float(top[0] - top[1]), abs=1e-6)
        assert got.entropy[i] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
    params = SamplingParams(temperature=0.5, top_k=3)
    got = candidates(logits, params, np.full(5, 0.5), entropy=True)
    for i in range(5):
        top = torch.softmax(logits[i].double() / 0.5, 0).topk(3)
        p = top.values / top.values.sum()
        where = top.indices.tolist().index(got.tokens[i])
        assert got.confidence[i] == pytest.approx(float(p[where]))
        assert got.entropy[i] == pytest.approx(float(-(p * p.log()).sum()))


def test_chunks_change_nothing(monkeypatch):
    logits = torch.randn(9, 16)
    whole = candidates(logits, SamplingParams(temperature=1.0), np.linspace(0.05, 0.95, 9))
    monkeypatch.setattr(unmask, "CHUNK", 32)
    parts = candidates(logits, SamplingParams(temperature=1.0), np.linspace(0.05, 0.95, 9))
    assert (whole.tokens == parts.tokens).all() and (whole.confidence == parts.confidence).all()


def test_draws_have_the_law_and_impossible_tokens_never_come():
    law = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    n = 4000
    tokens = draw(law.expand(n, -1), (np.arange(n) + 0.5) / n)
    assert torch.bincount(tokens, minlength=6).tolist() == [0, 1000, 0, 2000, 1000, 0]
    assert draw(law, np.array([1 - 2.0**-53])).item() == 4
    assert draw(law, np.array([2.0**-54])).item() == 1


def test_credit_equals_its_dense_form():
    torch.manual_seed(1)
    credit, matrix = Credit(0.7), torch.zeros(6, 8)
    for step in range(4):
        positions = [0, 2, 5][: 3 - step // 2]
        logits = torch.randn(len(positions), 8)
        fused = logits.clone()
        credit.fuse(fused, positions)
        matrix[positions] *= Credit.DECAY
        top = torch.softmax(logits, -1).max(-1)
        for at, p, token in zip(positions, top.values, top.indices, strict=True):
            matrix[at, token] += p**Credit.GAMMA
        assert torch.allclose(fused, logits + 0.7 * torch.log1p(matrix[positions]), atol=1e-6)
