"""Memory budgets: the estimate is the fact, the solver is brute force, the peak stays inside, the text stays the same."""

import random
from dataclasses import replace

import numpy as np
import pytest

from stretto.decoding.memory import (
    Plan,
    Side,
    estimate,
    expected_value,
    frontier,
    knee,
    least,
    parse_size,
    show,
    side_of,
    solve,
)
from stretto.decoding.registry import make
from stretto.engine.cache import SlotAllocator
from stretto.errors import CapacityError, OptionError
from tiny import engine, greedy, model, run, tokens

TARGET = Side(kv=260, logits=256, activations=1400, workspace=9000, weights=0)
DRAFT = Side(kv=130, logits=256, activations=700, workspace=5000, weights=40_000)


@pytest.fixture(scope="module")
def net():
    return model()


def prompts(n, seed=0):
    rng = random.Random(seed)
    return [[rng.choice([5, 6, 7, 9, 11, 13]) for _ in range(rng.randint(1, 40))] for _ in range(n)]


def test_sizes():
    assert [parse_size(x) for x in ("3GiB", "1.5 MB", "4096", "2kib", "10 B")] == [3 << 30, 1_500_000, 4096, 2048, 10]
    for bad in ("", "-1GiB", "3 apples", "GiB", "0", "1e3"):
        with pytest.raises(OptionError, match="budget"):
            parse_size(bad)
    assert show(3 << 30) == "3.00 GiB" and show(12) == "12 B"


def test_limits_of_the_allocator():
    alloc = SlotAllocator(10)
    first = alloc.alloc(4)
    alloc.limit(6)
    assert (alloc.total, alloc.free, alloc.used, alloc.peak) == (6, 2, 4, 4)
    rest = alloc.alloc(2)
    assert len({*first.tolist(), *rest.tolist()}) == 6 and alloc.peak == 6
    with pytest.raises(CapacityError, match="0 of 6"):
        alloc.alloc(1)
    alloc.release(first)
    alloc.release(rest)
    held = alloc.alloc(6)
    assert sorted(held.tolist()) == sorted([*first.tolist(), *rest.tolist()]), "no other slot is touched"
    for slots in (5, 11, 0):
        with pytest.raises(CapacityError, match=f"{slots} cache slots"):
            alloc.limit(slots)
    alloc.limit(9)
    assert alloc.free == 3 and len({*held.tolist(), *alloc.alloc(3).tolist()}) == 9
    alloc.limit(10)
    assert alloc.free == 1


@pytest.mark.parametrize("draft", [None, DRAFT])
def test_solver_equals_brute_force_and_is_monotone(draft):
    last = -1.0
    for budget in range(60_000, 400_000, 17_000):
        plan = solve(TARGET, draft, budget, context=40, sequences=2, most_nodes=5, most_rows=64)
        best = None
        for count in (2, 1):
            for drafting in {False, draft is not None}:
                for nodes in range(2, 6) if drafting else (1,):
                    for rows in (1, 2, 4, 8, 16, 32, 64):
                        slots = count * (40 + nodes)
                        tight = Plan(slots, rows, nodes, drafting, count, 40)
                        if rows >= nodes * count and estimate(TARGET, draft, tight)["total"] <= budget:
                            best = max(best or (0, 0.0), (count, expected_value(rows, nodes, drafting)))
        assert (plan is None) == (best is None)
        if plan is not None and best is not None:
            worth = expected_value(plan.rows, plan.nodes, plan.draft)
            assert (plan.sequences, worth) == best
            total = estimate(TARGET, draft, plan)["total"]
            per_slot = TARGET.kv + (DRAFT.kv if plan.draft else 0)
            assert budget - per_slot < total <= budget, "all that is left becomes slots"
            assert plan.sequences * 10 + worth >= last, "a smaller budget never gives a better plan"
            last = plan.sequences * 10 + worth


def test_frontier_and_knee():
    points = frontier(TARGET, DRAFT, context=40, sequences=2, most_nodes=9)
    assert [p[0] for p in points] == sorted(p[0] for p in points)
    assert [p[1] for p in points] == sorted(p[1] for p in points)
    for size, _, plan in points:
        assert estimate(TARGET, DRAFT, plan)["total"] == size
    size, worth, _ = knee(points, 0.96)
    assert worth >= 0.96 * points[-1][1]
    assert all(p[1] < 0.96 * points[-1][1] for p in points if p[0] < size)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_text_is_the_same_at_every_budget_and_the_peak_inside(net, backend):
    jobs = prompts(5)
    want = [tokens(s) for (s,) in run(engine(net, backend=backend), [(p, greedy(30), "ar", {}) for p in jobs])]
    for size in (150, 320, 600) if backend == "native" else (400,):
        for options in ({"model": "other"}, {"drafter": "suffix"}):
            eng = engine(net, backend=backend)
            scale = 1 if backend == "native" else 4
            method = make("specmemo", eng.host, options | {"budget": f"{size * scale}KiB", "context": 140})
            streams = [eng.add(p, greedy(30), method)[0] for p in jobs]
            while eng.busy:
                eng.step()
            assert [tokens(s) for s in streams] == want
            fact, plan = method.used(), method.predicted
            assert fact["total"] <= plan["total"] <= method.budget
            assert all(fact[part] <= plan[part] + plan.get(f"{part} scratch", 0) for part in fact if part != "total")
            assert eng.runner.peak_rows <= method.plan.rows and eng.runner.alloc.peak <= method.plan.slots


def test_estimates_are_the_allocations(net):
    eng = engine(net)
    side = side_of(eng.runner)
    pool = eng.runner.pool
    assert side.kv * pool.slots == pool.nbytes + pool.positions.nbytes
    assert side.weights == sum(p.numel() * 4 for p in net.parameters())
    assert side.logits == 4 * net.config.vocab_size
    for rows in (16, 40, 200):
        eng = engine(net, max_rows=512, prefix_caching=False)
        run(eng, [(([5, 9, 7] * 100)[:rows], greedy(1), "ar", {})])
        fact, guess = eng.runner.native.scratch_bytes, side.workspace + side.activations * rows
        assert fact <= guess <= 1.1 * fact + side.workspace


def test_the_bound_is_tight(net):
    side = side_of(engine(net).runner)
    bound = least(side, None, 140)["total"]
    options = {"model": "other", "context": 140}
    eng = engine(net)
    method = make("specmemo", eng.host, options | {"budget": str(bound)})
    assert (method.plan.slots, method.plan.rows, method.plan.draft) == (141, 1, False)
    assert any("no drafts" in n for n in eng.host.notes)
    with pytest.raises(OptionError, match=rf"at least .*{bound} bytes.*140 tokens.*kv .*context=139 would fit"):
        make("specmemo", engine(net).host, options | {"budget": str(bound - side.kv)})
    both = least(side, side_of(engine(model(seed=1)).runner), 140)["total"]
    assert make("specmemo", engine(net).host, options | {"budget": str(both)}).plan.draft
    assert not make("specmemo", engine(net).host, options | {"budget": str(both - 1)}).plan.draft


def test_the_budget_holds_while_the_method_has_sequences(net):
    eng = engine(net)
    total = eng.runner.alloc.total
    small = make("specmemo", eng.host, {"drafter": "suffix", "budget": "120KiB", "context": 100})
    large = make("specmemo", eng.host, {"drafter": "suffix", "budget": "400KiB", "context": 100})
    assert (eng.runner.alloc.total, eng.runner.max_rows) == (total, None)
    eng.add([5, 9, 7], greedy(20, ignore_eos=True), large)
    assert (eng.runner.alloc.total, eng.runner.max_rows) == (large.slots, large.plan.rows)
    eng.add([5, 9, 7], greedy(4, ignore_eos=True), small)
    assert (eng.runner.alloc.total, eng.runner.max_rows) == (small.slots, small.plan.rows), "the tighter one counts"
    while eng.busy:
        eng.step()
    assert (eng.runner.alloc.total, eng.runner.max_rows) == (total, None)
    busy = eng.add([5, 9] * 150, greedy(30, ignore_eos=True), make("ar", eng.host, {}))[0]
    eng.step()
    with pytest.raises(CapacityError, match=f"{small.slots} cache slots"):
        eng.add([5, 9], greedy(4), small)
    eng.abort(busy)


def test_a_request_that_cannot_fit_is_refused_alone(net):
    eng = engine(net)
    method = make("specmemo", eng.host, {"drafter": "suffix", "budget": "150KiB", "context": 200})
    with pytest.raises(CapacityError, match=rf"may need 409 .*150.00 KiB has {method.slots}"):
        eng.add([5] * 300, greedy(100), method)
    assert len(tokens(run(eng, [([5, 9], greedy(5, ignore_eos=True), "ar", {})])[0][0])) == 5


def test_drafts_shrink_before_anybody_is_preempted_and_grow_again(net):
    eng = engine(net, prefix_caching=False)
    method = make("specmemo", eng.host, {"drafter": "suffix", "budget": "130KiB", "context": 120, "num_draft_tokens": 7})
    seen = []
    inner = method._inner.propose
    method._inner.propose = lambda seqs: seen.append(max(s.row_limit for s in seqs)) or inner(seqs)
    length = method.slots // 2 - 23
    streams = [eng.add([5, 9, 7] * (length // 3), greedy(24, ignore_eos=True), method)[0] for _ in range(2)]
    while eng.busy:
        eng.step()
    assert all(s.seq.metrics.preemptions == 0 for s in streams)
    assert min(seen) < method.plan.nodes and any("cut to" in n for s in streams for n in s.seq.metrics.notes)
    seen.clear()
    run_one = eng.add([5, 9, 7], greedy(8, ignore_eos=True), method)[0]
    while eng.busy:
        eng.step()
    assert max(seen) == method.plan.nodes and not any("cut to" in n for n in run_one.seq.metrics.notes)


def test_random_workloads_stay_inside(net):
    rng = np.random.default_rng(0)
    for size in (160, 400):
        eng = engine(net, prefix_caching=bool(size == 400))
        method = make("specmemo", eng.host, {"model": "other", "budget": f"{size}KiB", "context": 120})
        for _ in range(12):
            streams = []
            for _ in range(int(rng.integers(1, 5))):
                prompt = rng.integers(5, 60, int(rng.integers(1, 50))).tolist()
                streams += eng.add(prompt, greedy(int(rng.integers(1, 9))), method)
            while eng.busy:
                eng.step()
                if rng.random() < 0.05:
                    eng.abort(streams[0])
            assert method.used()["total"] <= method.budget
        assert eng.runner.alloc.used == (eng.prefix.slots if eng.prefix else 0)
        if method._draft is not None:
            assert method._draft.alloc.used == 0


def test_plans_can_be_compared():
    assert replace(Plan(9, 8, 2, True, 2, 3), slots=10).scratch == 4
