"""Draft-and-verify methods on the engine: same text, same law, same cache, same logits, and never at a loss."""

import random
import time

import numpy as np
import pytest
import torch

from stretto.decoding.registry import make
from stretto.engine.engine import Engine
from stretto.engine.host import Host
from stretto.engine.pack import Plan, pack
from stretto.engine.params import SamplingParams
from stretto.engine.runner import LatencyCurve, Runner
from stretto.engine.types import Step
from stretto.errors import OptionError
from stretto.models.context import plain_logits
from tiny import EOS, Letters, config, greedy, model, tokens

CASES = {
    "ngram": ("ngram", {}),
    "ngram-tree": ("ngram", {"candidates": 3, "max_ngram": 2}),
    "suffix": ("suffix", {}),
    "suffix-tree": ("suffix", {"tree": True, "min_probability": 0.0}),
    "jacobi": ("jacobi", {}),
    "lookahead": ("lookahead", {}),
    "lookahead-wide": ("lookahead", {"ngram": 4, "window": 6, "candidates": 5}),
    "draft": ("draft", {"model": "other"}),
    "draft-itself": ("draft", {"model": "itself", "num_draft_tokens": 4}),
    "draft-tree": ("draft", {"model": "near", "num_draft_tokens": 9, "topk": 3, "depth": 3}),
    "draft-coupled": ("draft", {"model": "near", "acceptance": "coupled"}),
    "draft-coupled-tree": (
        "draft", {"model": "near", "num_draft_tokens": 8, "topk": 2, "acceptance": "coupled"}
    ),
}
EVERY = pytest.mark.parametrize("case", CASES)


def near(seed=5, noise=0.1, **same):
    """``model(**same)`` with disturbed weights: a draft that is often right."""
    out = model(**same)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in out.parameters():
            p += noise * p.std() * torch.randn_like(p)
    return out


@pytest.fixture(scope="module")
def net():
    return model()


def engine(net, *, slots=4096, draft_slots=None, plan=False, **options):
    runner = Runner(net, slots=slots, backend="torch")
    nets = {"other": lambda: model(seed=1), "near": near, "itself": lambda: net}

    def open_runner(name):
        return Runner(nets[name](), slots=draft_slots or slots, backend="torch")

    host = Host(runner, (EOS,), net.config.max_position_embeddings, open_runner, plan=plan)
    return Engine(runner, host, make_decoder=lambda skip: Letters(), **options)


def finish(eng, after=lambda: None):
    for _ in range(5000):
        if not eng.busy:
            return
        eng.step()
        after()
    raise AssertionError("the engine did not finish")


def complete(eng, method, prompts, params, constraint=None):
    streams = [
        eng.add(list(p), q, method, constraint=constraint)[0]
        for p, q in zip(prompts, [params] * len(prompts), strict=True)
    ]
    finish(eng)
    return streams


def prompts(n, seed=0):
    """Half random, half repetitive, so that copying pays."""
    rng = random.Random(seed)
    out = []
    for i in range(n):
        text = [rng.randrange(5, 40) for _ in range(rng.randint(1, 30))]
        out.append(text[:6] * 4 if i % 2 else text)
    return out


def reference(net, texts, params, **kw):
    eng = engine(net)
    return [tokens(s) for s in complete(eng, make("ar", eng.host), texts, params, **kw)]


# ---- the same text


@pytest.mark.parametrize("batch", [1, 8])
@EVERY
def test_greedy_is_plain_decoding(net, case, batch):
    name, options = CASES[case]
    texts = prompts(batch, batch)
    want = reference(net, texts, greedy(20))
    eng = engine(net)
    got = complete(eng, make(name, eng.host, options), texts, greedy(20))
    assert [tokens(s) for s in got] == want
    assert all(s.seq.metrics.tokens >= s.seq.metrics.forwards for s in got)
    assert eng.runner.alloc.used == eng.prefix.slots


def test_methods_share_a_batch(net):
    eng, texts = engine(net), prompts(24, 2)
    jobs = list(zip(texts, [CASES[c] for c in CASES] * 2, strict=True))
    streams = [eng.add(t, greedy(25), make(n, eng.host, o))[0] for t, (n, o) in jobs]
    finish(eng)
    assert [tokens(s) for s in streams] == reference(net, texts, greedy(25))


def test_stop_token_inside_a_span_and_exact_length(net):
    text = prompts(2, 3)[1]
    (whole,) = reference(net, [text], greedy(30, ignore_eos=True))
    for case, (name, options) in CASES.items():
        eng = engine(net)
        method = make(name, eng.host, options)
        for stop in (whole[4], whole[11]):
            params = greedy(30, ignore_eos=True, stop_token_ids=[stop])
            (stream,) = complete(eng, method, [text], params)
            assert tokens(stream) == whole[: whole.index(stop) + 1], case
        for n in (1, 2, 9):
            (stream,) = complete(eng, method, [text], greedy(n, ignore_eos=True))
            assert tokens(stream) == whole[:n], case


@pytest.mark.parametrize("case", [c for c in CASES if "draft" not in c or "coupled" in c])
def test_sampling_by_point_masses_is_plain_sampling(net, case):
    name, options = CASES[case]
    params = SamplingParams(max_tokens=24, temperature=0.7, top_p=0.9, top_k=20, seed=11)
    texts = prompts(3, 4)
    eng = engine(net)
    got = complete(eng, make(name, eng.host, options), texts, params)
    assert [tokens(s) for s in got] == reference(net, texts, params)


class Alternating:
    """A grammar: even and odd tokens take turns, along drafted paths too."""

    def __init__(self):
        self.final = 0

    def mask(self, path):
        return torch.arange(64) % 2 == (self.final + len(path)) % 2

    def advance(self, new):
        self.final += len(new)


@EVERY
def test_grammar_and_penalties_follow_the_path(net, case):
    name, options = CASES[case]
    params = greedy(20, repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={7: 1.0}, min_tokens=12)
    texts = prompts(2, 6)
    eng = engine(net)
    got = complete(eng, make(name, eng.host, options), texts, params, constraint=Alternating)
    assert [tokens(s) for s in got] == reference(net, texts, params, constraint=Alternating)
    for s in got:
        assert [t % 2 for t in tokens(s)] == [i % 2 for i in range(len(tokens(s)))]


# ---- the same cache, the same logits


@pytest.fixture
def scratch(net):
    return Runner(net, slots=1024, backend="torch")


@EVERY
def test_cache_is_that_of_a_plain_prefill(net, scratch, case):
    name, options = CASES[case]
    eng = engine(net)
    stream = eng.add(prompts(2, 7)[1], greedy(16, ignore_eos=True), make(name, eng.host, options))[0]
    slots = scratch.alloc.alloc(100)
    seen = set()

    def check():
        seq = stream.seq
        n = len(seq.view)
        if not n or n in seen:
            return
        seen.add(n)
        view, seq.view = seq.view, type(seq.view)(scratch.alloc)
        batch = pack([Plan(seq, 0, Step(seq.tokens[:n]), slots=slots[:n])])
        seq.view = view
        scratch.forward(batch)
        for mine, plain in ((eng.runner.pool.k, scratch.pool.k), (eng.runner.pool.v, scratch.pool.v)):
            assert (mine[:, seq.view.slots] - plain[:, slots[:n]]).abs().max() < 1e-5
        assert (eng.runner.pool.positions[seq.view.slots] == np.arange(n)).all()

    finish(eng, check)
    assert len(seen) >= 2


@EVERY
def test_logits_of_a_row_are_those_of_its_path(net, case):
    name, options = CASES[case]
    eng = engine(net)
    method = make(name, eng.host, options)
    inner, rows = method.commit, 0

    def commit(seqs, steps, outcomes):
        nonlocal rows
        for seq, step, outcome in zip(seqs, steps, outcomes, strict=True):
            for k, i in enumerate(range(len(step)) if step.logits is None else step.logits):
                path = [step.tokens[j] for j in visible(step, i)]
                plain = plain_logits(net, seq.tokens[:-1] + path)[-1]
                assert (outcome.logits[k] - plain).abs().max() < 2e-4
                rows += 1
        return inner(seqs, steps, outcomes)

    method.commit = commit
    complete(eng, method, prompts(2, 8), greedy(10, ignore_eos=True))
    assert rows >= 12


def visible(step, i):
    if isinstance(step.see, str):
        return range(i + 1)
    if isinstance(step.see, np.ndarray):
        return np.nonzero(step.see[i])[0]
    out = []
    while i >= 0:
        out.append(i)
        i = step.see[i]
    return out[::-1]


# ---- the same law


def chi2(net, draft, options, params, n=400):
    """Chi-square of the first two tokens of ``n`` choices, and its degrees of freedom."""
    runner = Runner(net, slots=1 << 14, backend="torch")
    host = Host(runner, (), 512, lambda name: Runner(draft, slots=1 << 14, backend="torch"), plan=False)
    eng = Engine(runner, host, make_decoder=lambda skip: Letters())
    method = make("draft", host, options)
    streams = eng.add([5, 9, 1], SamplingParams(n=n, max_tokens=2, ignore_eos=True, **params), method)
    finish(eng)
    sampler = streams[0].seq.sampler
    first = sampler.law(plain_logits(net, [5, 9, 1])[-1], 0)
    want = n * torch.stack([
        first[x] * sampler.law(plain_logits(net, [5, 9, 1, x])[-1], 1, [x]) for x in range(16)
    ])
    got = torch.zeros(16, 16)
    for s in streams:
        got[tuple(tokens(s))] += 1
    assert (got[want == 0] == 0).all()
    small = want < 5
    cells = [(g, w) for g, w in zip(got[~small].tolist(), want[~small].tolist(), strict=True)]
    cells.append((float(got[small].sum()), float(want[small].sum())))
    accepted = sum(s.seq.metrics.accepted for s in streams)
    return sum((g - w) ** 2 / max(w, 1e-9) for g, w in cells if w), len(cells) - 1, accepted


@pytest.mark.parametrize("options, params", [
    ({"num_draft_tokens": 3}, {"temperature": 1.0, "seed": 1}),
    ({"num_draft_tokens": 6, "topk": 3, "depth": 2}, {"temperature": 0.8, "top_p": 0.9, "seed": 2}),
], ids=["chain", "tree"])
def test_rejection_follows_the_law(options, params):
    net = model(scale=1.6, vocab_size=16)
    value, freedom, accepted = chi2(net, near(noise=0.5, scale=1.6, vocab_size=16), options, params)
    assert value < freedom + 4 * (2 * freedom) ** 0.5, "about four standard deviations"
    assert accepted > 100


# ---- the draft model's own cache


def test_a_perfect_draft_is_always_right(net):
    eng = engine(net)
    method = make("draft", eng.host, {"model": "itself", "num_draft_tokens": 4})
    (stream,) = complete(eng, method, [prompts(1, 9)[0]], greedy(30, ignore_eos=True))
    assert stream.seq.metrics.acceptance == 1.0 and stream.seq.metrics.forwards == 6
    assert method.model.runner.alloc.used == 0


def test_rejection_of_a_perfect_draft_accepts_everything(net):
    eng = engine(net)
    method = make("draft", eng.host, {"model": "itself", "num_draft_tokens": 4})
    params = SamplingParams(max_tokens=30, temperature=1.0, ignore_eos=True)
    (stream,) = complete(eng, method, [prompts(1, 9)[0]], params)
    assert stream.seq.metrics.acceptance > 0.98


def test_drafts_cache_follows_the_text(net):
    eng = engine(net)
    method = make("draft", eng.host, {"model": "near", "num_draft_tokens": 9, "topk": 3, "depth": 3})
    streams = [eng.add(p, greedy(25, ignore_eos=True), method)[0] for p in prompts(3, 10)]
    twin = Runner(method.model.runner.model, slots=256, backend="torch")
    slots = twin.alloc.alloc(120)

    def check():
        for s in streams:
            if s.finish_reason is None and len(view := s.seq.state.cache.view):
                n = len(view)
                assert n < len(s.seq.tokens)
                own, s.seq.view = s.seq.view, type(view)(twin.alloc)
                twin.forward(pack([Plan(s.seq, 0, Step(s.seq.tokens[:n]), slots=slots[:n])]))
                s.seq.view = own
                got = method.model.runner.pool.k[:, view.slots]
                assert (got - twin.pool.k[:, slots[:n]]).abs().max() < 1e-5

    finish(eng, check)
    assert method.model.runner.alloc.used == 0


def test_a_small_draft_pool_is_shared_in_turns(net):
    texts = prompts(6, 11)
    eng = engine(net, draft_slots=90)
    method = make("draft", eng.host, {"model": "itself", "num_draft_tokens": 4})
    got = complete(eng, method, texts, greedy(30, ignore_eos=True))
    assert [tokens(s) for s in got] == reference(net, texts, greedy(30, ignore_eos=True))
    assert any("cache is full" in note for s in got for note in s.seq.metrics.notes)
    assert method.model.runner.alloc.used == 0


def test_a_draft_with_a_short_context_stops_drafting(net):
    eng = engine(net)
    eng.host.open_runner = lambda name: Runner(model(max_position_embeddings=32), slots=512, backend="torch")
    method = make("draft", eng.host, {"model": "short"})
    (got,) = complete(eng, method, [prompts(1)[0][:9]], greedy(40, ignore_eos=True))
    assert len(tokens(got)) == 40 and "drafting stopped: the draft's context is 32 tokens" in got.seq.metrics.notes


@pytest.mark.parametrize("options, text", [
    ({"num_draft_tokens": 4, "topk": 1, "depth": 3}, "4 for a chain"),
    ({"num_draft_tokens": 15, "topk": 2, "depth": 3}, "at most 14, all nodes of 3 levels with topk 2"),
    ({"num_draft_tokens": 2, "topk": 2, "depth": 3}, "at most 2"),
])
def test_sizes_that_do_not_go_together_are_refused(net, options, text):
    with pytest.raises(OptionError, match=text):
        make("draft", engine(net).host, {"model": "other", **options})


def test_bounds_of_n_are_refused(net):
    with pytest.raises(OptionError, match=r"at most max_ngram \(2\)"):
        make("ngram", engine(net).host, {"min_ngram": 3, "max_ngram": 2})


# ---- the planner on the engine


class Priced(Runner):
    """A runner with a made-up latency curve: ``slope`` is the price of a further row in forwards of one row.

    Its forwards take that time by a clock that nothing else moves (``priced_time``)."""

    now = 1.0

    def __init__(self, net, slope, one=1.0):
        super().__init__(net, slots=4096, backend="torch")
        self._price = LatencyCurve([1, 2], [one, one * (1 + slope)])
        self.ran = 0

    def curve(self, context=128):
        return self._price

    def forward(self, batch, early=None):
        self.ran += 1
        Priced.now += self._price(len(batch.tokens))
        return super().forward(batch, early)


@pytest.fixture
def priced_time(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: Priced.now)


def planned(net, draft, slope, name, options, texts, params, *, step=0.2):
    eng = engine(net)
    eng.runner.__class__, eng.host.plan = Priced, True
    priced = Priced(net, slope)
    eng.runner.curve, eng.runner._price = priced.curve, priced._price
    second = Priced(draft, 0.0, step)
    eng.host.open_runner = lambda model: second
    method = make(name, eng.host, options)
    eng.runner.ran = 0
    return complete(eng, method, texts, params), second, method


def test_a_useless_draft_is_switched_off_and_says_why(net, priced_time):
    texts, params = prompts(2, 12), greedy(200, ignore_eos=True)
    got, second, _ = planned(net, model(seed=1), 0.3, "draft", {"model": "x"}, texts, params)
    assert [tokens(s) for s in got] == reference(net, texts, params)
    for s in got:
        assert any(n.startswith("speculation off at output token ") and ": 1." in n and "times the time of one" in n for n in s.seq.metrics.notes)
        assert s.seq.metrics.forwards > 180
    assert second.ran < 40, "a few steps to learn it, and rare probes"


def test_a_good_draft_stays_on_and_long(net, priced_time):
    got, _, _ = planned(net, net, 0.02, "draft", {"model": "x"}, prompts(1, 12), greedy(240, ignore_eos=True), step=0.02)
    assert got[0].seq.metrics.tokens_per_forward > 5 and not got[0].seq.metrics.notes


def test_dear_rows_switch_everything_off(net, priced_time):
    params = greedy(60, ignore_eos=True)
    for case, (name, options) in CASES.items():
        got, _, _ = planned(net, near(), 1.0, name, options, prompts(1, 13), params)
        metrics = got[0].seq.metrics
        assert metrics.rows - metrics.prefill_forwards < 60 + 30 + 30, case
        assert tokens(got[0]) == reference(net, prompts(1, 13), params)[0], case


def test_a_probe_finds_out_that_drafting_pays_again(net, priced_time):
    """The draft is wrong at first and perfect later: the planner notices within its probes."""
    class Turning(Priced):
        good = False

        def forward(self, batch, early=None):
            result = super().forward(batch, early)
            if not self.good:
                result.logits = -result.logits
                result.argmax = result.logits.argmax(-1).numpy()
            return result

    eng = engine(net)
    eng.host.plan = True
    eng.runner.__class__, priced = Priced, Priced(net, 0.02)
    eng.runner.curve, eng.runner._price, eng.runner.ran = priced.curve, priced._price, 0
    second = Turning(net, 0.0, 0.05)
    eng.host.open_runner = lambda model: second
    stream = eng.add(prompts(1, 14)[0], greedy(450, ignore_eos=True), make("draft", eng.host, {}))[0]
    while stream.seq.generated < 60:
        eng.step()
    assert stream.seq.state.pace.off
    second.good = True
    finish(eng)
    assert stream.seq.metrics.forwards < 400


def test_fixed_lengths_without_a_planner(net):
    eng = engine(net)
    method = make("draft", eng.host, {"model": "other", "num_draft_tokens": 3})
    (got,) = complete(eng, method, [prompts(1)[0]], greedy(40, ignore_eos=True))
    assert got.seq.metrics.drafted >= 3 * (got.seq.metrics.forwards - 3)


# ---- what the sources find


def test_ngram_copies_and_runs_into_itself(net):
    from stretto.decoding.ngram import _copy

    assert _copy([1, 2, 3, 1, 2], 3, 5) == [1, 2, 1, 2, 1]
    eng = engine(net)
    method = make("ngram", eng.host, {"num_draft_tokens": 4})
    stream = eng.add([7, 8, 9, 10, 7, 8], greedy(8), method)[0]
    (step,) = method.propose([fresh(stream)])
    assert step.tokens == [8, 9, 10, 7, 8]


def test_suffix_remembers_earlier_outputs(net):
    eng = engine(net)
    method = make("suffix", eng.host, {"cache_requests": 4})
    text, params = prompts(1, 15)[0], greedy(40, ignore_eos=True)
    (first,) = complete(eng, method, [text], params)
    (again,) = complete(eng, method, [text], params)
    assert tokens(first) == tokens(again)
    assert again.seq.metrics.forwards < 0.6 * first.seq.metrics.forwards
    assert not first.seq.metrics.notes and "from 1 earlier outputs" in again.seq.metrics.notes[0], "it is disclosed"
    stranger = eng.add(text, params, method, salt="another tenant")[0]
    finish(eng)
    assert stranger.seq.metrics.forwards > 0.8 * first.seq.metrics.forwards, "tenants share nothing"
    for seed in range(8):
        complete(eng, method, prompts(1, seed), greedy(12))
    assert len(method._outputs[""].generations) == 2 and 2 <= method._outputs[""].remembered <= 4


def fresh(stream):
    seq = stream.seq
    seq.computed = len(seq.tokens) - 1
    return seq


def test_lookahead_mask_by_the_definition():
    from stretto.decoding.lookahead import visibility

    see = visibility([-1, 0, 1, 0], 2, 3)
    assert see[:4, :4].tolist() == [
        [True, False, False, False], [True, True, False, False], [True, True, True, False],
        [True, False, False, True],
    ]
    for l in range(2):
        for c in range(3):
            seen = {(k, d) for k in range(2) for d in range(3) if see[4 + 3 * l + c, 4 + 3 * k + d]}
            assert seen == {(0, d) for d in range(c + 1)} | {(k, c) for k in range(l + 1)}
            assert see[4 + 3 * l + c, :4].tolist() == [True, False, False, False]


def test_jacobi_ends_in_fewer_steps_on_a_constant_text():
    net = model(seed=3, scale=0.0)
    eng = engine(net)
    (got,) = complete(eng, make("jacobi", eng.host, {}), [[5, 6]], greedy(32, ignore_eos=True))
    assert got.seq.metrics.forwards <= 6 and set(tokens(got)) == {0}
    assert config().vocab_size == 64
