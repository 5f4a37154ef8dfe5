"""The planner of slots against brute force and against simulation."""

import itertools
import random

import numpy as np
import pytest

from stretto.decoding.slots import SlotTree, best_plan, evaluate, fixed_plan, own, spread
from stretto.decoding.tree import best_first
from stretto.errors import OptionError

ACC = [[0.6, 0.2, 0.1], [0.45, 0.2, 0.05]]
SURE = [[0.95, 0.03, 0.01], [0.9, 0.05, 0.01]]
K = 2


def test_own_sums_to_one_and_is_the_chance_of_ending_there():
    shape = best_first(ACC, 6)
    last = own(shape)
    assert sum(last) == pytest.approx(1) and min(last) >= 0
    rng = random.Random(1)
    counts = np.zeros(len(last))
    tree = SlotTree.of(shape, 6, [0] * 7)
    for _ in range(20_000):
        counts[_walk(rng, tree, ACC)] += 1
    assert np.allclose(counts / 20_000, last, atol=0.01)


def _walk(rng, tree, acc):
    """Which node a step ends on, drawn from acc: at most one child of a node is right."""
    node, depth = 0, 0
    while True:
        children = {tree.rank[i]: i + 1 for i, p in enumerate(tree.parent) if p == node}
        if not children or depth == len(acc):
            return node
        u, ranks = rng.random(), acc[depth]
        right = next((r for r, edge in enumerate(itertools.accumulate(ranks)) if u < edge), None)
        if right not in children:
            return node
        node, depth = children[right], depth + 1


def test_spread_equals_brute_force():
    worth = [0.0, 0.7, 1.0]
    last = own(best_first(ACC, 3))
    for slots in range(K + 3, 9):
        got = spread(last, worth, slots, least=1)
        assert got[0] == K and sum(got) == min(slots, K * 4) and min(got) >= 1
        tried = [s for s in itertools.product(range(1, K + 1), repeat=3) if sum(s) == sum(got) - K]
        best = max(sum(p * worth[n] for p, n in zip(last[1:], s, strict=True)) for s in tried)
        assert sum(p * worth[n] for p, n in zip(last[1:], got[1:], strict=True)) == pytest.approx(best)


def _all_trees(acc, state, nodes):
    """Every tree of ``nodes`` candidates, as (parents, ranks, depths, gains)."""
    if not nodes:
        return [((), (), (), ())]
    out = set()
    for parents, ranks, depths, gains in _all_trees(acc, state, nodes - 1):
        for p in range(nodes):
            depth = depths[p - 1] if p else 0
            if depth == state:
                continue
            used = [ranks[i] for i, q in enumerate(parents) if q == p]
            base = gains[p - 1] if p else 1.0
            for r in range(len(acc[0])):
                if r not in used and r == len(used):  # ranks in order: others are worse
                    out.add(((*parents, p), (*ranks, r), (*depths, depth + 1), (*gains, base * acc[depth][r])))
    return list(out)


def _policies(acc, state, most, slots, least):
    for nodes in range(1, most + 1) if state else [0]:
        for tree in _all_trees(acc, state, nodes):
            for extra in itertools.product(range(least, K + 1), repeat=nodes):
                for root in slots:
                    yield SlotTree(*tree, (root, *extra))


def test_fixed_plan_equals_brute_force_over_node_sets_and_slot_counts():
    for rows in (6, 7, 8):
        plan = fixed_plan(ACC, rows)
        choices = [
            [t for t in _policies(ACC, s, 3, [K], 1) if t.rows == min(rows, t.nodes * (K + 1))] for s in range(K + 1)
        ]
        best = max(
            evaluate([[a], [b], [c]], [1.0], [[1.0]] * 3).tokens for a, b, c in itertools.product(*choices)
        )
        assert plan.tokens == pytest.approx(best, rel=1e-9), rows
        assert all(t.rows <= rows for same in plan.trees[1:] for t in same)
    with pytest.raises(OptionError, match="at least 5"):
        fixed_plan(ACC, 4)


def test_best_plan_equals_brute_force_on_a_measured_curve():
    for seconds in ([1 + 0.12 * max(0, n - 1) for n in range(12)], [max(1.0, 0.25 * n) for n in range(12)]):
        plan = best_plan([(1.0, ACC)], seconds, rows=6, nodes=3)
        choices = [
            [t for t in _policies(ACC, s, 2, range(K + 1), 0) if t.rows <= 6] + ([SlotTree((), (), (), (), (n,)) for n in range(K + 1)] if s else [])
            for s in range(K + 1)
        ]  # fmt: skip
        best = 0.0
        for a, b, c in itertools.product(*choices):
            trees = [[a], [b], [c]]
            try:
                best = max(best, evaluate(trees, [1.0], [[seconds[t.rows]] for (t,) in trees]).rate)
            except np.linalg.LinAlgError:
                continue
        assert plan.rate >= best * (1 - 1e-9), seconds
        assert plan.rate <= best * 1.02  # three candidates were allowed, the brute force had two


def test_plain_decoding_is_among_the_choices_and_wins_where_rows_cost_what_they_give():
    plan = best_plan([(1.0, ACC)], [n + 0.0 for n in range(40)])
    assert plan.rate == pytest.approx(1.0) and all(t.rows == 1 for same in plan.trees for t in same)
    assert best_plan([(1.0, ACC)], [1.0] * 40).rate > 2


@pytest.mark.parametrize("kinds", [[(1.0, ACC)], [(0.5, ACC), (0.5, SURE)]], ids=["one-kind", "two-kinds"])
def test_the_chain_is_what_a_simulation_does(kinds):
    """pi sums to 1; tokens and rows per step of many steps drawn from acc; the share of each state."""
    plan = best_plan(kinds, [1 + 0.06 * n for n in range(65)])
    assert sum(plan.law) == pytest.approx(1)
    rng, state, steps = random.Random(3), 0, 50_000
    tokens = rows = 0
    seen = np.zeros(K + 1)
    for _ in range(steps):
        seen[state] += 1
        kind = int(rng.random() > kinds[0][0])
        tree = plan.trees[state][kind]
        node = _walk(rng, tree, kinds[kind][1])
        tokens += 1 + (tree.depth[node - 1] if node else 0)
        rows += tree.rows
        state = tree.slots[node]
    assert tokens / steps == pytest.approx(plan.tokens, rel=0.01)
    assert rows / steps == pytest.approx(plan.rows, rel=0.01)
    assert np.allclose(seen / steps, plan.law, atol=0.01)


def test_kinds_that_can_be_told_apart_are_worth_more_than_their_mean():
    seconds = [1 + 0.1 * n for n in range(65)]
    mean = [[(a + b) / 2 for a, b in zip(x, y, strict=True)] for x, y in zip(ACC, SURE, strict=True)]
    assert best_plan([(0.5, ACC), (0.5, SURE)], seconds).rate > best_plan([(1.0, mean)], seconds).rate


def test_slots_that_enter_late_cost_less_and_are_used_more():
    seconds = [1 + 0.15 * n for n in range(65)]
    full, late = (best_plan([(1.0, ACC)], seconds, slot_rows=[c] * K) for c in (1.0, 0.3))
    assert late.rate > full.rate
    assert sum(t.slots[0] for (t,) in late.trees) >= sum(t.slots[0] for (t,) in full.trees)
