"""The "slots" layout: fewest moves, rows that stay what they are, and the same text as with pages."""

import itertools

import numpy as np
import pytest
import torch

import tiny
from stretto.engine.engine import Engine
from stretto.engine.host import Host
from stretto.engine.runner import Runner
from stretto.engine.slot_cache import SlotCache, moves
from stretto.errors import CapacityError, UnsupportedError
from stretto.models.strided import strided

REGIONS, LENGTH = 6, 192


def engine(backend="torch", compaction=True, **options):
    net = tiny.model()
    runner = Runner(
        net, slots=REGIONS * LENGTH, backend=backend, regions=REGIONS, compaction=compaction, deterministic=options.pop("deterministic", True)
    )
    host = Host(runner, (tiny.EOS,), LENGTH - 64, lambda name: Runner(tiny.model(seed=1), slots=4096, backend=backend, deterministic=True), plan=False)
    return Engine(runner, host, make_decoder=lambda skip: tiny.Letters(), **options)


def test_the_number_of_moves_is_the_brute_force_minimum():
    for n in range(1, 11):
        for live in itertools.product([False, True], repeat=n):
            k = sum(live)
            least = min(k - sum(live[i : i + k]) for i in range(n - k + 1))
            done = moves(list(live))
            after = np.array(live)
            for source, target in done:
                assert after[source] and not after[target]
                after[source], after[target] = False, True
            at = np.nonzero(after)[0]
            assert len(done) == least and (not k or at[-1] - at[0] == k - 1)
            assert [s for s, _ in done] == sorted(s for s, _ in done) and [t for _, t in done] == sorted(t for _, t in done)


JOBS = [
    ([5, 9, 11, 5, 9, 11, 5, 9], 8), ([7] * 20, 40), ([30, 31, 32], 16), (list(range(5, 60)), 60), ([8, 9], 5), ([40, 41, 40, 41, 40], 33),
    ([12] * 3, 50), ([13, 14], 21),
]
METHODS = [("ar", {}), ("ngram", {"candidates": 3}), ("suffix", {}), ("jacobi", {}), ("lookahead", {}), ("draft", {"model": "other", "topk": 2})]


@pytest.mark.parametrize("compaction", [True, False], ids=["compact", "holes"])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_texts_equal_those_of_pages_for_all_methods(backend, compaction):
    """Chains, trees and blocks; sequences that come, end and move while others run."""
    if backend == "native" and Runner(tiny.model(), slots=64).native is None:
        pytest.skip("no native forward here")
    mixed = [(p, tiny.greedy(n), *METHODS[i % len(METHODS)]) for i, (p, n) in enumerate(JOBS)]
    want = [tiny.tokens(s[0]) for s in tiny.run(tiny.engine(tiny.model(), backend=backend), [(p, g, "ar", {}) for p, g, _, _ in mixed])]
    eng = engine(backend, compaction)
    assert [tiny.tokens(s[0]) for s in tiny.run(eng, mixed)] == want
    cache = eng.runner.alloc
    assert cache.used == 0 and cache.free == cache.total and cache.finished >= len(JOBS)
    assert (cache.moved > 0) == compaction


def test_live_regions_are_contiguous_and_moves_change_no_row():
    eng = engine()
    cache, pool = eng.runner.alloc, eng.runner.pool
    made = tiny.make("ar", eng.host)
    streams = [eng.add(list(p), tiny.greedy(n, ignore_eos=True), made)[0] for p, n in JOBS]
    live_rows = generated = 0
    copy = cache._copy

    def checked(source, target):
        before = [x[:, torch.from_numpy(source.astype(np.int64))].clone() for x in (pool.k, pool.v)]
        size = copy(source, target)
        for x, y in zip((pool.k, pool.v), before, strict=True):
            assert torch.equal(x[:, torch.from_numpy(target.astype(np.int64))], y)
        return size

    cache._copy = checked
    while eng.busy:
        progress = eng.step()
        live_rows += len(progress)
        generated += sum(len(p.tokens) for p in progress)
        eng.runner.alloc.tidy()
        lo, hi = cache.window
        assert hi - lo + 1 == sum(cache.live)
        for s in streams:
            if s.finish_reason is None and len(s.seq.view):
                slots = s.seq.view.slots
                assert (np.diff(slots) == 1).all() and slots[0] % LENGTH == 0
    assert live_rows == generated == sum(n for _, n in JOBS) and cache.moved > 0 and cache.moved_bytes > 0


def test_the_window_is_read_without_gathering():
    keys = [np.arange(a, a + n) for a, n in ((192, 7), (384, 12), (576, 3))]
    found = strided(keys, 12, REGIONS * LENGTH)
    x = torch.randn(REGIONS * LENGTH, 2, 3)
    assert found and found.view(x).data_ptr() == x[192].data_ptr()
    for i, k in enumerate(keys):
        assert torch.equal(found.view(x)[i, : len(k)], x[torch.from_numpy(k)])
    assert strided([keys[0], keys[2], keys[1]], 12, 1152) is None and strided([keys[0], keys[1][::2]], 12, 1152) is None
    assert strided([np.arange(1146, 1150)], 12, 1152) is None


def test_what_the_layout_cannot_do_is_refused():
    eng = engine()
    made = tiny.make("ar", eng.host)
    eng.host.max_model_len = 500
    with pytest.raises(CapacityError, match=str(LENGTH)):
        eng.add([5] * 150, tiny.greedy(60), made)
    (stream,) = eng.add([5, 6], tiny.greedy(4), made)
    eng.step()
    with pytest.raises(UnsupportedError, match="paged"):
        stream.seq.view.fork()
    assert eng.prefix is None and 0.9 < eng.runner.alloc.waste < 1
    with pytest.raises(CapacityError, match="max_num_seqs"):
        SlotCache(4, 8, lambda a, b: 0)


def test_choices_run_side_by_side_without_a_fork():
    eng, pages = engine(), tiny.engine(tiny.model(), backend="torch")
    params = tiny.greedy(10)
    params.n, params.temperature, params.seed = 3, 1.0, 7
    job = [([5, 6, 7], params, "ar", {})]
    assert [tiny.tokens(s) for s in tiny.run(eng, job)[0]] == [tiny.tokens(s) for s in tiny.run(pages, job)[0]]
