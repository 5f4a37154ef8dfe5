"""The parts of draft-and-verify that need no model: trees, verification, laws, the planner."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.decoding import verify
from stretto.decoding.costs import allot
from stretto.decoding.suffix import Automaton
from stretto.decoding.tree import Tree, best_first, depth_limited_value
from stretto.decoding.verify import accept_chain, accept_tree, draw_without_replacement, reject, remove
from stretto.engine.params import SamplingParams
from stretto.engine.sampling import Sampler, noise
from stretto.engine.types import Outcome, Sequence

CARD = (0.6, 0.2, 0.1)


# ---- trees


def test_identical_siblings_are_one_node():
    tree = Tree.rooted(9)
    a = tree.add(0, 1)
    assert tree.add(0, 1) == a
    b = tree.add(a, 1)
    assert (tree.tokens, tree.parent, tree.depth) == ([9, 1, 1], [-1, 0, 1], [0, 1, 2])
    assert tree.path(b) == [a, b] and tree.path(0) == []


@pytest.mark.parametrize("nodes, value", [(2, 1.6), (3, 1.96), (4, 2.176), (5, 2.376), (6, 2.5056), (8, 2.7456)])
def test_best_tree_of_the_card(nodes, value):
    assert best_first([CARD] * 9, nodes - 1).value == pytest.approx(value, abs=1e-12)
    assert depth_limited_value(CARD, nodes, 9) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("nodes, value", [(2, 1.6), (3, 1.8), (4, 1.9), (5, None)])
def test_best_tree_of_two_levels(nodes, value):
    assert depth_limited_value(CARD, nodes, 2) == (value and pytest.approx(value, abs=1e-12))
    if value is None:
        assert len(best_first([CARD] * 9, nodes - 1, 1).gain) < nodes - 1


def closed_trees(acc, nodes):
    """Every tree of exactly ``nodes`` drafts in which rank r needs rank r - 1: lists of (depth, gain)."""
    def grow(chosen, frontier, left):
        if not left:
            yield chosen
            return
        for i, (depth, rank, base) in enumerate(frontier):
            gain = base * acc[depth][rank]
            more = frontier[i + 1 :]  # canonical order: what was passed over is never taken later
            if rank + 1 < len(acc[depth]):
                more = [*more, (depth, rank + 1, base)]
            if depth + 1 < len(acc):
                more = [*more, (depth + 1, 0, gain)]
            yield from grow([*chosen, (depth + 1, gain)], more, left - 1)

    yield from grow([], [(0, 0, 1.0)], nodes)


falling = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3).map(lambda x: sorted(x, reverse=True))


@settings(max_examples=30, deadline=None)
@given(st.lists(falling, min_size=1, max_size=5), st.integers(1, 6))
def test_best_first_is_brute_force(acc, nodes):
    trees = list(closed_trees(acc, nodes))
    shape = best_first(acc, nodes)
    if not trees:
        assert len(shape.gain) < nodes
        return
    assert shape.value == pytest.approx(1 + max(sum(g for _, g in t) for t in trees), abs=1e-12)
    for i, (parent, rank) in enumerate(zip(shape.parent, shape.rank, strict=True)):
        assert parent <= i, "a prefix of the order is a tree"
        if rank:
            assert (parent, rank - 1) in set(zip(shape.parent[:i], shape.rank[:i], strict=True))


@settings(max_examples=30, deadline=None)
@given(falling, st.integers(1, 7), st.integers(1, 5))
def test_the_dynamic_program_is_best_first(acc, nodes, levels):
    value = depth_limited_value(acc, nodes, levels)
    shape = best_first([acc] * 8, nodes - 1, levels - 1)
    assert (value is None) == (len(shape.gain) < nodes - 1)
    if value is not None:
        assert shape.value == pytest.approx(value, abs=1e-12)


# ---- the planner


curves = st.lists(st.floats(0.0, 0.5), min_size=10, max_size=10).map(lambda d: np.cumsum([1.0, *d]).tolist())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=8), curves, st.floats(0, 0.3), st.floats(0, 0.5))
def test_length_of_a_chain_is_brute_force(rates, target, step, extra):
    gains = np.cumprod(rates).tolist()
    levels = [step * (1 + 0.1 * n) for n in range(10)]

    def rate(k):
        cost = target[1 + k] + k * levels[1] + (extra if k else 0)
        return (1 + sum(gains[:k])) / cost

    target = [0.0, *target]
    (count,), best = allot([gains], target, extra=[extra], levels=levels)
    assert best == pytest.approx(max(rate(k) for k in range(len(gains) + 1)))
    assert rate(count) == pytest.approx(best)


@settings(max_examples=25, deadline=None)
@given(st.lists(falling, min_size=2, max_size=4), curves, st.floats(0, 0.3))
def test_size_and_depth_of_a_tree_are_brute_force(acc, target, step):
    target = [0.0, *target]
    levels = [step] * 10
    best = 1 / target[1]
    for n in range(1, 6):
        for tree in closed_trees(acc, n):
            depth = max(d for d, _ in tree)
            best = max(best, (1 + sum(g for _, g in tree)) / (target[1 + n] + depth * step))
    found = 0.0
    for depth in range(1, len(acc) + 1):
        shape = best_first(acc, 5, depth)
        found = max(found, allot([shape.gain], target, levels=levels, depths=[shape.depth])[1])
    assert found == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0.01, 0.99), max_size=3), min_size=1, max_size=3), curves)
def test_rows_of_a_batch_are_brute_force(rates, target):
    offers = [np.cumprod(r).tolist() for r in rates]
    target = [0.0, *target, 9.0, 9.0, 9.0]
    n = len(offers)
    counts, best = allot(offers, target)
    every = itertools.product(*(range(len(o) + 1) for o in offers))
    brute = max(
        (n + sum(sum(o[:k]) for o, k in zip(offers, ks, strict=True))) / target[n + sum(ks)] for ks in every
    )
    assert best == pytest.approx(brute)
    assert (n + sum(sum(o[:k]) for o, k in zip(offers, counts, strict=True))) / target[n + sum(counts)] == (
        pytest.approx(best)
    )


def test_no_speculation_is_among_the_choices():
    steep = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert allot([[0.9, 0.8, 0.7]], steep) == ([0], 1.0)
    assert allot([[0.9, 0.8, 0.7]], [0.0, 1.0, 1.0, 1.0, 1.0])[0] == [3]
    assert allot([[0.9], []], [0.0, 1.0, 1.0, 1.1])[0] == [1, 0]


# ---- verification


def fake(logits=None, argmax=None, temperature=0.0, seed=0):
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=100)
    seq = Sequence(0, [0], 1, params, None, None, Sampler(params))
    n = len(argmax) if logits is None else len(logits)
    return seq, Outcome(logits, None if argmax is None else np.array(argmax), 0, n, {}, slice(0, n))


def test_chain_and_tree_agree_by_hand():
    seq, outcome = fake(argmax=[5, 6, 9, 1])
    commit = accept_chain(seq, [0, 5, 6, 7], outcome)
    assert commit.tokens == [5, 6, 9] and list(commit.keep) == [0, 1, 2] and commit.accepted == 2
    commit = accept_tree(seq, [0, 4, 5, 6], [-1, 0, 0, 2], fake(argmax=[5, 0, 6, 1])[1])
    assert commit.tokens == [5, 6, 1] and commit.keep == [0, 2, 3] and commit.drafted == 3


def exact(p, q, k):
    """(P(some child is accepted), emitted law) over all draws of k children, all tries."""
    out, accepted = np.zeros(len(p)), 0.0

    def walk(p, q, tried, weight):
        nonlocal accepted
        if len(tried) == k:
            out[:] += weight * p
            return
        for x in np.nonzero(q)[0]:
            a = min(1.0, p[x] / q[x])
            out[x] += weight * q[x] * a
            accepted += weight * q[x] * a
            if a < 1:
                walk(*remove(p, q, [*tried, x]), [*tried, x], weight * q[x] * (1 - a))

    walk(np.array(p, float), np.array(q, float), [], 1.0)
    return accepted, out


@pytest.mark.parametrize(
    "p, q, accepted",
    [((0.5, 0.3, 0.2), (0.2, 0.5, 0.3), (0.7, 0.808571, 1.0)),
     ((0.1, 0.2, 0.3, 0.4), (0.4, 0.3, 0.2, 0.1), (0.6, 0.764286, 0.840298, 1.0))],
)
def test_vectors_of_the_card(p, q, accepted):
    for k, value in enumerate(accepted, 1):
        got, law = exact(p, q, k)
        assert got == pytest.approx(value, abs=1e-6)
        assert np.abs(law - p).max() < 1e-12


laws = st.integers(2, 5).flatmap(
    lambda v: st.tuples(*[st.lists(st.integers(0, 20), min_size=v, max_size=v).filter(any)] * 2)
)


@settings(max_examples=60, deadline=None)
@given(laws, st.integers(1, 5))
def test_rejection_keeps_the_law(pair, k):
    p, q = (np.array(x) / sum(x) for x in pair)
    _, law = exact(p, q, min(k, np.count_nonzero(q)))
    assert np.abs(law - p).max() < 1e-12


def test_reject_follows_its_thresholds():
    p, q = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.3, 0.2, 0.1])
    assert reject(p, q, [0, 1], [0.2499, 0.5])[0] == 0
    p2, q2 = remove(p, q, [0])
    assert p2.tolist() == pytest.approx([0, 0, 0.25, 0.75]) and q2.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 6])
    hit, rest = reject(p, q, [0, 2], [0.2501, 0.7499])
    assert hit == 1 and rest.tolist() == pytest.approx(p2.tolist())
    assert reject(p, q, [0, 2], [0.2501, 0.7501])[0] is None
    assert reject(p, np.array([0.0, 1.0, 0.0, 0.0]), [1, 0, 3], [0.99, 0.99, 0.99])[0] == 2, "uniform once q is spent"


def shapes(nodes):
    """All parent lists of trees with ``nodes`` drafts, children in order."""
    return [p for p in itertools.product(*(range(i + 1) for i in range(nodes))) if list(p) == sorted(p)]


def law_of_texts(text, length, p):
    """{text: probability} of all texts of ``length`` tokens behind ``text``."""
    if len(text) == length:
        return {text: 1.0}
    out = {}
    for x, weight in enumerate(p[text]):
        for longer, w in law_of_texts((*text, x), length, p).items():
            out[longer] = out.get(longer, 0.0) + weight * w
    return out


def random_laws(v, length, seed):
    rng = np.random.default_rng(seed)
    texts = [t for n in range(length) for t in itertools.product(range(v), repeat=n)]
    return [{t: rng.dirichlet(np.full(v, 0.7)) for t in texts} for _ in range(2)]


def check_law(emitted, p, length):
    got = {}
    for text, weight in emitted.items():
        for longer, w in law_of_texts(text, length, p).items():
            got[longer] = got.get(longer, 0.0) + weight * w
    want = law_of_texts((), length, p)
    assert max(abs(got.get(t, 0.0) - w) for t, w in want.items()) < 1e-12
    assert sum(got.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("v, most", [(2, 4), (3, 3)])
def test_trees_of_point_masses_keep_the_law(v, most):
    """Enumerates every choice of the target at every row of every tree of at most four drafts."""
    for nodes in range(1, most + 1):
        p, _ = random_laws(v, nodes + 2, nodes)
        for parent in shapes(nodes):
            for tokens in itertools.product(range(v), repeat=nodes):
                parents, texts = [-1, *parent], [()]
                for i, token in enumerate(tokens, 1):
                    texts.append((*texts[parents[i]], token))
                emitted = {}
                for choices in itertools.product(range(v), repeat=nodes + 1):
                    weight = np.prod([p[t][c] for t, c in zip(texts, choices, strict=True)])
                    seq, outcome = fake(argmax=choices)
                    text = tuple(accept_tree(seq, [0, *tokens], parents, outcome).tokens)
                    emitted[text] = emitted.get(text, 0.0) + weight
                check_law(emitted, p, nodes + 1)


@pytest.mark.parametrize("v, most", [(2, 4), (3, 4), (5, 2)])
def test_trees_drawn_without_replacement_keep_the_law(v, most):
    """Every tree of at most four drafts, every draw, every try."""
    for nodes in range(1, most + 1):
        p, q = random_laws(v, nodes + 2, 7 + nodes)
        for parent in shapes(nodes):
            below = {}
            for i, above in enumerate(parent, 1):
                below.setdefault(above, []).append(i)
            emitted = {}

            def walk(node, text, weight):
                children = below.get(node, [])[:v]

                def try_one(k, p_now, q_now, tried, w):
                    if k == len(children):
                        for x in range(v):
                            emitted[(*text, x)] = emitted.get((*text, x), 0.0) + w * p_now[x]
                        return
                    for x in np.nonzero(q_now)[0]:
                        a = min(1.0, p_now[x] / q_now[x])
                        walk(children[k], (*text, int(x)), w * q_now[x] * a)
                        if a < 1:
                            rest = remove(p_now, q_now, [*tried, x])
                            try_one(k + 1, *rest, [*tried, x], w * q_now[x] * (1 - a))

                try_one(0, p[text], q[text], [], weight)

            walk(0, (), 1.0)
            check_law(emitted, p, nodes + 1)


def test_walk_of_the_code_is_the_walk_of_the_proof(monkeypatch):
    """accept_rejection on a tree with forced tries: descends, gives up, and emits from what is left."""
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3))
    q = np.array([0.4, 0.3, 0.2, 0.1])
    tries = {0: [0.9, 0.9], 1: [0.9]}
    real = verify.noise
    monkeypatch.setattr(verify, "noise", lambda key, index, draw, n: np.array(tries[index]) if draw == 2 else real(
        key, index, draw, n))
    seq, outcome = fake(logits, temperature=1.0)
    commit = verify.accept_rejection(seq, [0, 0, 3, 1], [-1, 0, 0, 2], {0: q, 2: q}, outcome)
    assert commit.keep == [0, 2] and commit.tokens[0] == 3 and commit.tokens[1] in (2, 3), "(p - q)+ lies on 2, 3"
    assert (commit.drafted, commit.accepted) == (3, 1)


def test_draws_without_replacement_follow_the_definition():
    q, n = np.array([0.5, 0.3, 0.2, 0.0]), 5_000
    seen = {}
    for i in range(n):
        draw = tuple(draw_without_replacement(q, noise(1, i, 1, 4), 2))
        seen[draw] = seen.get(draw, 0) + 1
    chi2 = 0.0
    for a, b in itertools.permutations(range(3), 2):
        want = n * q[a] * q[b] / (1 - q[a])
        chi2 += (seen.pop((a, b)) - want) ** 2 / want
    assert not seen and chi2 < 20.5, "99.9 % quantile of chi-square with 5 degrees of freedom"
    assert len(draw_without_replacement(q, noise(1, 0, 1, 4), 4)) == 3, "tokens without mass are never drawn"


# ---- the suffix automaton


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=4))
def test_automaton_counts_like_the_definition(texts):
    automaton = Automaton()
    for n, text in enumerate(texts):
        state = 0
        for i, token in enumerate(text):
            state = automaton.extend(state, token)
            if n == 0:
                longest = max(
                    k for k in range(i + 1)
                    if any(text[i + 1 - k : i + 1] == text[j : j + k] for j in range(i - k + 1))
                )
                assert automaton.length[automaton.link[state]] == longest
    for text in texts:
        for i in range(len(text)):
            for j in range(i + 1, len(text) + 1):
                state = matched = 0
                for token in text[i:j]:
                    state, matched = automaton.follow(state, matched, token)
                assert matched == j - i
                want = sum(
                    t[k : k + j - i] == text[i:j] for t in texts for k in range(len(t) - (j - i) + 1)
                )
                assert automaton.count[state] == want
