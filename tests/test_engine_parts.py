"""Parts of the engine that need no model: slots and views, the prefix cache, stops, parameters, noise, the law."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.engine.cache import PrefixCache, SlotAllocator, View
from stretto.engine.pack import Plan, _pack, pack
from stretto.engine.params import SamplingParams
from stretto.engine.sampling import Sampler, noise, truncate
from stretto.engine.text import StopChecker
from stretto.engine.types import FULL, Step
from stretto.errors import CapacityError, OptionError, UnknownNameError


def test_allocator_is_exact():
    alloc = SlotAllocator(8)
    a = alloc.alloc(5)
    assert a.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(CapacityError, match="4 cache slots wanted, 3 of 8 are free"):
        alloc.alloc(4)
    alloc.release(a)
    assert alloc.free == 8


class Model:
    """The obvious reference of a view: a Python list of labels, one per slot owner."""

    def __init__(self):
        self.rows = []


OPS = st.lists(
    st.tuples(
        st.sampled_from(["append", "fork", "truncate", "replace", "release"]),
        st.integers(0, 7),
        st.integers(0, 40),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(OPS)
def test_views_follow_the_obvious_reference(ops):
    alloc = SlotAllocator(4096)
    label = np.full(4096, -1)
    views, refs, counter = [View(alloc)], [[]], 0
    for op, which, size in ops:
        i = which % len(views)
        view, ref = views[i], refs[i]
        if op == "append":
            slots = alloc.alloc(size)
            new = list(range(counter, counter + size))
            label[slots], counter = new, counter + size
            view.append(slots)
            ref += new
        elif op == "fork" and len(views) < 8:
            views.append(view.fork())
            refs.append(list(ref))
        elif op == "truncate":
            n = size % (len(ref) + 1)
            view.truncate(n)
            del ref[n:]
        elif op == "replace" and len(view) > view.shared:
            start = view.shared + size % (len(view) - view.shared)
            slots = alloc.alloc(1)
            label[slots], counter = counter, counter + 1
            view.replace(start, slots)
            ref[start] = counter - 1
        elif op == "release":
            view.release()
            ref.clear()
        for v, r in zip(views, refs, strict=True):
            assert label[v.slots].tolist() == r
    for v in views:
        v.release()
    assert alloc.used == 0


def test_prefix_cache_shares_full_blocks_and_evicts_from_the_end():
    alloc = SlotAllocator(128)
    cache = PrefixCache(alloc)
    tokens = list(range(50))
    first = View(alloc)
    first.append(alloc.alloc(50))
    cache.insert(first, tokens, "", 50)
    kept = first.slots[:48].copy()
    first.release()
    assert alloc.used == 48
    second = View(alloc)
    assert cache.attach(second, tokens, "", 49) == 48
    assert (second.slots == kept).all()
    assert cache.evict(10) == 0, "blocks in use are never evicted"
    other = View(alloc)
    assert cache.attach(other, tokens, "another tenant", 49) == 0
    second.release()
    assert cache.evict(1) == 16
    third = View(alloc)
    assert cache.attach(third, tokens, "", 49) == 32, "the deepest block went first"
    third.release()
    cache.evict(1000)
    assert alloc.used == 0


class Letters:
    """Decoder in which token i is the i-th letter."""

    def push(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def flush(self):
        return ""


def test_stop_string_across_tokens_and_inside_a_commit():
    checker = StopChecker(SamplingParams(stop=["cd", "zz"], max_tokens=20), [25], Letters())
    assert checker.check([0, 1], 0).reason is None
    assert checker.safe == 1, "one letter may be the start of a stop string"
    cut = checker.check([2, 3, 4, 5], 2)
    assert (cut.keep, cut.reason, cut.stop) == (2, "stop", "cd")
    assert checker.finish() == "ab"


def test_stop_token_and_length():
    params = SamplingParams(max_tokens=4, min_tokens=2)
    assert StopChecker(params, [9], None).check([9, 1, 9, 2], 0).keep == 3
    assert StopChecker(params, [9], None).check([1, 2, 3, 4, 5], 0) == (
        StopChecker(params, [9], None).check([1, 2, 3, 4], 0)
    )
    assert StopChecker(SamplingParams(max_tokens=4, ignore_eos=True), [9], None).check([9] * 9, 0).keep == 4


@pytest.mark.parametrize(
    "field, value",
    [("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.5), ("max_tokens", 0),
     ("max_tokens", 1.5), ("n", 0), ("top_k", -2), ("stop", [""]), ("logit_bias", {"x": 1}), ("seed", "a")],
)
def test_bad_parameters_name_the_field(field, value):
    with pytest.raises(OptionError, match=field):
        SamplingParams(**{field: value})


def test_unknown_parameter_names_the_nearest():
    with pytest.raises(UnknownNameError, match="temperature"):
        SamplingParams.make(temprature=1)


def test_noise_is_a_function_of_its_key():
    assert (noise(5, 3, 0, 100) == noise(5, 3, 0, 100)).all()
    draws = [noise(5, 3, 0, 4), noise(6, 3, 0, 4), noise(5, 4, 0, 4), noise(5, 3, 1, 4)]
    assert len({tuple(d) for d in draws}) == 4
    assert abs(noise(1, 1, 1, 100_000).mean() - 0.5) < 0.005


def test_pick_follows_the_law():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=3)
    sampler = Sampler(params)
    law = sampler.law(logits, 0)
    draws = np.bincount([sampler.pick(logits, i) for i in range(20_000)], minlength=4)
    expected = law.numpy() * 20_000
    live = expected > 0
    assert draws[~live].sum() == 0
    chi2 = ((draws - expected)[live] ** 2 / expected[live]).sum()
    assert chi2 < 16.3, "99.9 % quantile of chi-square with 3 degrees of freedom"


@pytest.mark.parametrize("more", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_pick_is_gumbel_max_over_the_law(more):
    generator = torch.Generator().manual_seed(7)
    for temperature in (0.1, 0.8, 3.0):
        sampler = Sampler(SamplingParams(temperature=temperature, seed=4, **more))
        for i in range(100):
            logits = 3 * torch.randn(300, generator=generator)
            logits[200:] = -torch.inf if i % 2 else logits[200:]
            gumbel = -np.log(-np.log(noise(sampler.key, i, 0, 300)))
            assert sampler.pick(logits, i) == int((sampler.law(logits, i).log() + torch.from_numpy(gumbel)).argmax())


@given(
    st.lists(st.floats(0.001, 1), min_size=2, max_size=12),
    st.integers(0, 13), st.floats(0.05, 1), st.floats(0, 1),
)
def test_truncation_equals_the_definition(weights, top_k, top_p, min_p):
    p = torch.tensor(weights, dtype=torch.float64)
    p = p / p.sum()
    order = sorted(range(len(p)), key=lambda i: (-float(p[i]), i))
    keep = order[:top_k] if 0 < top_k < len(p) else list(order)
    if top_p < 1:
        total, run, short = float(p[keep].sum()), 0.0, []
        for i in keep:
            if run >= top_p - 1e-12 and short:
                break
            short.append(i)
            run += float(p[i]) / total
        keep = short
    keep = [i for i in keep if float(p[i]) >= min_p * float(p[order[0]]) or not min_p]
    got = truncate(p, SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p))
    assert abs(float(got.sum()) - 1) < 1e-12
    assert set(torch.nonzero(got).flatten().tolist()) == set(keep)


def test_penalties_and_bias_by_hand():
    params = SamplingParams(
        temperature=0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0, logit_bias={3: 10.0}
    )
    sampler = Sampler(params, prompt=[0])
    sampler.advance([1, 1])
    out = sampler.process(torch.tensor([1.0, -1.0, 4.0, 0.0]), 2, path=[2])
    assert out.tolist() == [0.5, -2.0 - 0.5 - 0.5, 2.0 - 0.75, 10.0]


class Cached:
    """As much of a sequence as packing looks at: tokens, the first ``length`` of which are cached."""

    taps, shift, reads, team = (), 3, (), None

    def __init__(self, alloc, tokens, length):
        self.tokens, self.view = tokens, View(alloc)
        self.view.append(alloc.alloc(length))


def a_plan(alloc, length, lead, n, logits):
    """A chain of ``n`` rows behind ``lead`` prompt rows; n = 0: the prompt rows alone."""
    seq = Cached(alloc, list(range(100, 100 + length + lead + 1)), length)
    plan = Plan(seq, lead, Step(list(range(7, 7 + n)), logits=logits) if n else None)  # type: ignore[arg-type]
    plan.slots = alloc.alloc(plan.rows)
    return plan


@pytest.mark.parametrize(
    "shapes",
    [[(5, 0, 1, None)], [(0, 9, 1, None)], [(3, 4, 3, (0, 2))], [(2, 6, 0, None)], [(70, 0, 140, None)],
     [(4, 0, 1, None), (9, 0, 1, None), (1, 0, 1, None)]],
)  # fmt: skip
def test_the_short_ways_of_packing_equal_the_long_one(shapes):
    alloc = SlotAllocator(4096)
    plans = [a_plan(alloc, *shape) for shape in shapes]
    got, places = pack(plans), [(p.row, p.logit) for p in plans]
    expected = _pack(plans, 1)
    assert places == [(p.row, p.logit) for p in plans]
    for name in FIELDS:
        x, y = getattr(got, name), getattr(expected, name)
        assert x.tolist() == y.tolist() and x.dtype == y.dtype, name
    assert got.in_one().tolist() == np.concatenate([getattr(got, name) for name in FIELDS[1:]]).tolist()


FIELDS = (
    "tokens", "positions", "slots", "context_of", "context_ptr", "local_ptr", "context", "local", "logit_rows",
)  # fmt: skip


def test_a_step_that_is_no_chain_goes_the_long_way():
    alloc = SlotAllocator(64)
    seq = Cached(alloc, list(range(9)), 6)
    for step in (Step([1, 2], see=FULL), Step([1, 2], see=[-1, -1]), Step([1], positions=[9]), Step([1], context=[(0, 2)])):
        plan = Plan(seq, 0, step)  # type: ignore[arg-type]
        plan.slots = alloc.alloc(plan.rows)
        assert not plan.chain(1)
        assert pack([plan]).in_one().tolist() == _pack([plan], 1).in_one().tolist()
    assert not Plan(seq, 3, None).chain(4)  # type: ignore[arg-type]
