"""Mirrored speculation: exact whatever the draft does; hypotheses, messages, overlap and times as defined."""

import threading
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from stretto.bench.timeline import timeline
from stretto.decoding.registry import make
from stretto.errors import OptionError
from stretto.models.context import plain_logits
from stretto.planning.mirror_times import Setup, best_exit, expected_tokens, rates, simulate
from tiny import V, engine, greedy, model, run, tokens

TEXT = [5, 9, 7, 5, 9, 7, 11]


@pytest.fixture(scope="module")
def net():
    return model(num_hidden_layers=4)


def play(net, options, n=40, prompts=(TEXT, TEXT[::-1]), spoil=None, **kw):
    eng = engine(net, **kw)
    method = make("mirror", eng.host, {"model": "other", "draft_timeout": 5.0} | options)
    if spoil is not None:
        spoil(method)
    streams = [eng.add(list(p), greedy(n, ignore_eos=True), method)[0] for p in prompts]
    while eng.busy:
        eng.step()
    want = run(eng, [(p, greedy(n, ignore_eos=True), "ar", {}) for p in prompts])
    assert [tokens(s) for s in streams] == [tokens(s) for (s,) in want]
    return method, streams


def settled(method):
    """Wait until the worker has read everything."""
    end = time.perf_counter() + 5
    while method.worker._live and time.perf_counter() < end:
        time.sleep(0.002)
    return method.worker


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_forks_are_freed_and_messages_are_counted(net, backend):
    method, streams = play(net, {"early_top_k": 3}, backend=backend)
    worker = settled(method)
    assert worker.failure is None and worker.runner.alloc.used == 0
    stats = worker.stats
    assert set(stats.bytes) == {"early", "verdict"}, "no third kind of message is paid for"
    rows = sum(s.seq.metrics.rows - s.seq.prompt_len + 1 for s in streams)
    assert 0 <= 3 * 6 * rows - stats.bytes["early"] <= 3 * 6 * len(streams), "6 bytes a candidate, but for last steps"
    assert stats.bytes["verdict"] <= 8 * sum(s.seq.metrics.forwards for s in streams)


def test_windows_are_the_drafts_own_chain(net):
    """Reused or fresh, a window is what the draft would say behind the whole text: its K/V are those of the text."""
    seen = []

    def spy(method):
        take = method.worker.take
        method.worker.take = lambda number, step, timeout: seen.append((number, take(number, step, timeout))) or seen[-1][1]
        step = method._step
        method._step = lambda seq, n: (step(seq, n), seen and texts.append((len(seen), list(seq.tokens))))[0]

    texts: list = []
    method, _ = play(net, {"early_top_k": 8, "num_draft_tokens": 3}, spoil=spy)
    draft, checked = model(seed=1), 0
    for count, text in texts[:60:3]:
        window = seen[count - 1][1]
        for i, token in enumerate(window):
            logits = plain_logits(draft, text + window[:i])[-1]
            assert logits.max() - logits[token] < 1e-3
            checked += 1
    assert checked > 20 and settled(method).stats.reused > 0


def test_all_candidates_leave_no_fallback(net):
    stats = settled(play(net, {"early_top_k": V, "num_draft_tokens": 1})[0]).stats
    assert stats.reused == stats.steps > 50


def test_fallback_falls_with_more_candidates(net):
    found = [settled(play(net, {"early_top_k": k})[0]).stats for k in (1, 4, 16)]
    shares = [s.reused / s.steps for s in found]
    assert shares == sorted(shares) and shares[0] < shares[-1]
    assert all(s.reused >= s.covered for s in found), "fallbacks are at most what the early exit misses"


def test_a_draft_that_dies_or_lies_changes_nothing(net):
    def dies(method):
        def grow(growing):
            raise RuntimeError("the device is gone")

        method.worker._grow = grow

    method, streams = play(net, {}, spoil=dies)
    assert "the device is gone" in method.worker.failure
    assert any("the device is gone" in n for s in streams for n in s.seq.metrics.notes)

    def lies(method):
        rng = np.random.default_rng(0)
        method.worker.take = lambda *a: rng.integers(0, V, 4).tolist()

    play(net, {}, spoil=lies)

    def sleeps(method):
        method.worker._grow = lambda growing: time.sleep(0.02)

    start = time.perf_counter()
    method, _ = play(net, {"draft_timeout": 0.0}, n=10, spoil=sleeps)
    assert method.worker.stats.late > 0 and time.perf_counter() - start < 10


def test_cancelling_frees_the_drafts_rows(net):
    eng = engine(net)
    method = make("mirror", eng.host, {"model": "other"})
    streams = [eng.add(list(TEXT), greedy(60, ignore_eos=True), method)[0] for _ in range(3)]
    for _ in range(6):
        eng.step()
    for s in streams:
        eng.abort(s)
    assert settled(method).runner.alloc.used == 0
    worker = method.worker
    del method
    eng.host.notes.clear()
    worker.stop()
    worker.join()
    assert not any(t is worker._thread for t in threading.enumerate())


def test_the_draft_works_while_the_target_does(net):
    """With a slow upper half, drafting begins before it ends, in every step whose hypothesis came true."""

    def slow(method):
        runner = method._host.runner
        whole = runner.forward

        def forward(batch, early=None):
            return whole(batch, {l: (lambda r, f=f: (f(r), time.sleep(0.02))) for l, f in (early or {}).items()})

        runner.forward = forward

    method, _ = play(net, {"trace": True, "early_top_k": V, "num_draft_tokens": 2}, n=12, prompts=[TEXT], spoil=slow)
    trace = settled(method).stats.trace
    upper = [(a, b) for who, what, a, b in trace if who == "target" and what.startswith("layers 3")]
    drafts = [(a, b) for who, _, a, b in trace if who == "draft"]
    overlapped = sum(any(a < end and start < b for a, b in drafts) for start, end in upper)
    assert overlapped >= len(upper) - 2 > 3
    svg = timeline(trace, title="overlap")
    root = ET.fromstring(svg)
    assert len(root.findall(".//{*}rect/{*}title")) == len(trace) and "script" not in svg


def test_refusals(net):
    for options, match in (
        ({"early_exit_layer": 4}, r"1\.\.3"), ({"early_top_k": V + 1}, f"vocabulary, {V}"),
        ({"num_draft_tokens": 0}, "num_draft_tokens"),
    ):
        with pytest.raises(OptionError, match=match):
            make("mirror", engine(net).host, {"model": "other"} | options)
    with pytest.raises(OptionError, match=r"1\.\.47"):
        Setup(exit=48)
    with pytest.raises(OptionError, match="at least one"):
        timeline([])


def by_hand(s, steps, seed):
    """Seconds a step of ``simulate``, added up without events; no rollout is cut just when a forward ends."""
    rng = np.random.default_rng(seed)
    if s.alpha < 1:
        rng.geometric(1 - s.alpha, steps)
    own, forward, total = s.lower + s.upper + s.channel, s.rollout / s.gamma, 0.0
    for covered in rng.random(steps) < s.omega:
        left, at = s.gamma, s.lower + s.channel
        while covered and left and at < own:
            at, left = at + forward, left - 1
        total += max(at, own) + left * s.draft
    return total / steps


@pytest.mark.parametrize("setup", [
    Setup(), Setup(omega=0.0), Setup(draft=5.1e-3, omega=0.8), Setup(branch=0.0213), Setup(draft=0.0),
    Setup(layers=7, exit=2, draft=1.3e-3, channel=7e-4, gamma=3, kappa=2, omega=0.5, alpha=1.0),
])
def test_events_take_the_time_that_adds_up_by_hand(setup):
    seconds = by_hand(setup, 200, 3)
    found = simulate(setup, steps=200, seed=3)
    assert found["tokens_per_step"] / found["mirror"] == pytest.approx(seconds, rel=1e-9)
    assert found["waited"] == pytest.approx(seconds - setup.lower - setup.upper - setup.channel, rel=1e-6, abs=1e-12)


def test_times_have_their_limits():
    s = Setup(omega=1.0, channel=0.0)
    free = Setup(draft=0.0, channel=0.0, alpha=0.7)
    tokens_a_step = expected_tokens(0.7, 7)
    assert rates(free)["mirror"] == pytest.approx(tokens_a_step * rates(free)["ar"]), "a free draft: target time"
    exit_at_end = Setup(exit=47, layers=48, layer=1e-9, draft=1e-3, channel=0.0, omega=1.0)
    assert rates(exit_at_end)["mirror"] == pytest.approx(rates(exit_at_end)["speculation"], rel=1e-3)
    for setup in (s, Setup(draft=5e-3, omega=0.8), Setup(draft=1e-4, omega=0.5), Setup(branch=0.02)):
        closed, events = rates(setup), simulate(setup)
        if setup.rollout <= setup.upper:
            assert events["mirror"] == pytest.approx(closed["mirror"], rel=0.03)
        else:  # what the verdict prunes need not be drafted to the end
            assert events["mirror"] >= 0.97 * closed["mirror"]
        assert events["tokens_per_step"] == pytest.approx(expected_tokens(setup.alpha, setup.gamma), rel=0.03)
    layer, rate = best_exit(Setup(), {l: min(1.0, 0.4 + l / 48) for l in range(6, 48, 6)})
    assert 6 <= layer <= 42 and rate >= rates(Setup())["speculation"]
