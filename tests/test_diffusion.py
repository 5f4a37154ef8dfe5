"""The diffusion method on the engine against a decoder without engine, cache or batch."""

import random

import numpy as np
import pytest
import torch

from stretto.decoding.registry import METHODS, make
from stretto.engine.params import SamplingParams
from stretto.errors import CapacityError, InputError, OptionError, PromptError, UnsupportedError
from stretto.models.context import PackedContext, plain_logits
from tiny import EOS, MASK, V, engine, greedy, model, run, tokens

KINDS = {
    "full": {"attention": "full", "mask_token_id": MASK},
    "full-shift": {"attention": "full", "shift": True, "mask_token_id": MASK},
    "block": {"attention": "block", "block_size": 4, "mask_token_id": MASK},
    "block-shift": {"attention": "block", "block_size": 8, "shift": True, "mask_token_id": MASK},
}
TAU = 0.25  # random weights trust little: this gives both several tokens a forward and single ones


@pytest.fixture(scope="module")
def nets():
    shape = {"scale": 2.0, "tie_word_embeddings": False}
    return {kind: model(stretto=section, **shape) for kind, section in KINDS.items()}


def prompts(n, seed=0):
    rng = random.Random(seed)
    return [[rng.randint(5, V - 1) for _ in range(rng.randint(1, 21))] for _ in range(n)]


def law(net, ids, seen, rows):
    """Logits [n, V] of all positions. With ``rows`` = (a, b) only those are evaluated, and see the
    other positions as they were in the canvas ``seen``: what an approximate cache does, as one
    dense forward."""
    if rows is None:
        return plain_logits(net, ids)
    n, (a, b) = len(ids), rows
    see = torch.ones(n + b - a, n + b - a, dtype=torch.bool)
    see[:n, n:] = False
    see[n:, a:b] = False
    out = torch.full((n, V), float("nan"))
    with torch.no_grad():
        at = torch.tensor([*range(n), *range(a, b)])
        ctx = PackedContext([n + b - a], see)
        out[a:b] = net(torch.tensor(seen + ids[a:b]), at, ctx).float()[n:]
    return out


def cached_rows(cache, start, stop, n, shift, vicinity):
    if cache == "prefix":
        return start - shift, n
    return max(0, start - shift - vicinity), min(n, stop + vicinity)


def reference(
    net, prompt, n, *, length, tau=TAU, steps=None, cache=None, refresh=0, vicinity=0, stops=(EOS,)
):
    """(tokens, step map, log-probabilities) by the definition, greedy; each step computes all anew.

    ``steps``: fixed k instead of the threshold.
    """
    c = net.config
    block = c.attention == "block"
    ids, decided, logp, forward, end = list(prompt), {}, {}, 0, len(prompt) + n
    if not block:
        ids += [MASK] * n
    start = len(prompt)
    while start < end:
        if block:
            base = start // c.block_size * c.block_size
            ids += [MASK] * (base + c.block_size - len(ids))
            stop = min(base + (start - base) // length * length + length, base + c.block_size)
        else:
            stop = min(start + length, len(ids))
        turn, seen, count = 0, [], ids[start : min(stop, end)].count(MASK)
        while todo := [i for i in range(start, min(stop, end)) if ids[i] == MASK]:
            fresh = turn == 0 or (refresh and turn % refresh == 0)
            seen = list(ids) if fresh else seen
            rows = None
            if cache and not fresh:
                rows = cached_rows(cache, start, stop, len(ids), int(c.shift), vicinity)
            out = law(net, ids, seen, rows)[[i - c.shift for i in todo]]
            plain = torch.log_softmax(out.index_fill(1, torch.tensor([MASK]), -torch.inf), -1)
            best = sorted(range(len(todo)), key=lambda j: -plain[j].max())
            if steps:
                chosen = best[: count // steps + (turn < count % steps)]
            else:
                chosen = [j for j in best if plain[j].max() >= np.log(tau)] or best[:1]
            for j in chosen:
                ids[todo[j]] = int(plain[j].argmax())
                decided[todo[j]], logp[todo[j]] = forward, float(plain[j].max())
                if ids[todo[j]] in stops:
                    end = min(end, todo[j] + 1)
            forward, turn = forward + 1, turn + 1
        start = stop
    at = range(len(prompt), end)
    return [ids[i] for i in at], [decided[i] for i in at], [logp[i] for i in at]


def solo(net, prompt, params, options, **kw):
    return run(engine(net, **kw), [(prompt, params, "diffusion", options)])[0][0]


def facts(stream):
    return tokens(stream), stream.seq.step_map, stream.seq.metrics.forwards


@pytest.mark.parametrize("kind", ["full", "full-shift"])
@pytest.mark.parametrize("length, n", [(5, 17), (32, 9), (1, 4)])
def test_full_attention_without_cache_is_the_definition(nets, kind, length, n):
    options = {"cache": "none", "block_length": length, "threshold": TAU}
    for prompt in prompts(3, seed=length):
        want = reference(nets[kind], prompt, n, length=length)
        got = solo(nets[kind], prompt, greedy(n), options)
        assert (tokens(got), got.seq.step_map) == want[:2]


@pytest.mark.parametrize("kind", ["block", "block-shift"])
@pytest.mark.parametrize("size", [1, 2, 4, 7, 8, 9, 16])
def test_block_cache_is_the_definition(nets, kind, size):
    """The finished block's pass with final tokens is fused with the next block's first: as many
    forwards as the definition has, and the same tokens."""
    prompt = prompts(1, seed=3)[0] * 16
    for n in (1, 13):
        net, ask = nets[kind], prompt[:size]
        want = reference(net, ask, n, length=net.config.block_size, stops=())
        got = solo(net, ask, greedy(n, ignore_eos=True), {"threshold": TAU})
        assert (tokens(got), got.seq.step_map) == want[:2]
        assert got.seq.metrics.forwards == max(want[1]) + 1


@pytest.mark.parametrize("kind", ["block", "block-shift"])
def test_windows_inside_a_block_are_the_definition(nets, kind):
    for prompt in prompts(3, seed=8):
        want = reference(nets[kind], prompt, 15, length=3)
        got = solo(nets[kind], prompt, greedy(15), {"threshold": TAU, "block_length": 3})
        assert (tokens(got), got.seq.step_map) == want[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_steps_are_the_definition(nets, kind):
    length = 6 if "full" in kind else nets[kind].config.block_size
    options = {"unmask": "fixed", "steps": 3, "block_length": length}
    options |= {"cache": "none"} if "full" in kind else {}
    for prompt in prompts(2, seed=5):
        want = reference(nets[kind], prompt, 16, length=length, steps=3)
        got = solo(nets[kind], prompt, greedy(16), options)
        assert (tokens(got), got.seq.step_map) == want[:2]


@pytest.mark.parametrize("kind", ["full", "full-shift"])
@pytest.mark.parametrize(
    "cache, refresh, vicinity", [("prefix", 0, 0), ("prefix", 3, 0), ("dual", 0, 0), ("dual", 2, 3)]
)
def test_approximate_caches_are_their_definition(nets, kind, cache, refresh, vicinity):
    how = {"cache": cache, "refresh": refresh, "vicinity": vicinity}
    for prompt in prompts(3, seed=4):
        want = reference(nets[kind], prompt, 20, length=6, **how)
        got = solo(nets[kind], prompt, greedy(20), how | {"block_length": 6, "threshold": TAU})
        assert (tokens(got), got.seq.step_map) == want[:2]


@pytest.mark.parametrize("kind", ["full", "full-shift"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_refresh_every_step_is_no_cache(nets, kind, cache, temperature):
    params = SamplingParams(max_tokens=16, temperature=temperature, seed=3)
    for prompt in prompts(2, seed=6):
        base = {"block_length": 7, "threshold": TAU}
        want = solo(nets[kind], prompt, params, {"cache": "none", **base})
        got = solo(nets[kind], prompt, params, {"cache": cache, "refresh": 1, **base})
        assert facts(got) == facts(want)


@pytest.mark.parametrize("kind", KINDS)
def test_threshold_above_one_is_one_token_a_forward(nets, kind):
    prompt = prompts(1, seed=7)[0]
    one = solo(nets[kind], prompt, greedy(12, ignore_eos=True), {"threshold": 1.01})
    fixed = solo(nets[kind], prompt, greedy(12, ignore_eos=True), {"unmask": "fixed"})
    assert facts(one) == facts(fixed)
    assert one.seq.metrics.forwards == 12 and sorted(one.seq.step_map) == list(range(12))


@pytest.mark.parametrize("kind", KINDS)
def test_lower_threshold_never_takes_more_forwards_on_one_window(nets, kind):
    prompt, params = prompts(1, seed=7)[0], greedy(8, ignore_eos=True)
    runs = [solo(nets[kind], prompt, params, {"threshold": t}) for t in (0.0, 1.01)]
    assert runs[0].seq.metrics.forwards <= 3 < runs[1].seq.metrics.forwards == 8


MIX = [
    {"threshold": TAU}, {"unmask": "fixed", "steps": 2}, {"unmask": "eb", "threshold": 1.0},
    {"unmask": "factor", "score": "margin"},
    {"unmask": "entropy", "threshold": 2.0, "score": "neg_entropy"},
    {"unmask": "hierarchy", "threshold": 0.3, "low": 0.1},
    {"unmask": "dynamic", "steps": 2, "threshold": 0.3}, {"score": "random", "threshold": 1.01},
    {"score": "position", "unmask": "fixed"}, {"credit": 0.7, "threshold": TAU},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_alone_equals_a_batch_of_other_options(nets, kind, temperature):
    mix = [dict(o) for o in MIX]
    if "full" in kind:
        for o, cache in zip(mix, ["none", "prefix", "dual"] * 4, strict=False):
            o |= {"cache": cache, "block_length": 5}
    jobs = []
    for i, (p, o) in enumerate(zip(prompts(len(mix), seed=9), mix, strict=True)):
        params = SamplingParams(max_tokens=9 + i, temperature=temperature, top_k=i % 3 * 5, seed=i)
        jobs.append((p, params, "diffusion", o))
    eng = engine(nets[kind], max_rows=96, prefix_caching=False)
    for job, (stream,) in zip(jobs, run(eng, jobs), strict=True):
        alone = run(engine(nets[kind]), [job])[0][0]
        assert facts(stream) == facts(alone)
        assert stream.finish_reason == alone.finish_reason
    assert eng.runner.alloc.used == 0


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_repeats_varies_and_honours_top_k(nets, kind):
    def sample(seed, **kw):
        params = SamplingParams(max_tokens=12, seed=seed, ignore_eos=True, n=4, **kw)
        jobs = [(prompts(1)[0], params, "diffusion", {"threshold": TAU})]
        return [tokens(s) for s in run(engine(nets[kind]), jobs)[0]]

    first = sample(1)
    assert first == sample(1) and first != sample(2)
    assert len({tuple(t) for t in first}) == 4, "choices draw their own numbers"
    assert MASK not in {t for text in first for t in text}
    assert len({tuple(t) for t in sample(1, top_k=1)}) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"unmask": "fixed", "steps": 2}, {"score": "random", "threshold": 1.01}]
)
def test_max_tokens_is_exact(nets, kind, options):
    for n in (1, 3, 8, 33):
        stream = solo(nets[kind], prompts(1)[0], greedy(n, ignore_eos=True), options)
        metrics = stream.seq.metrics
        assert len(tokens(stream)) == n == metrics.tokens and stream.finish_reason == "length"
        assert metrics.forwards == max(stream.seq.step_map) + 1 and metrics.tokens_per_forward >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_end_of_text_policies(nets, kind):
    def ask(policy, bias, **kw):
        params = greedy(24, logit_bias={EOS: bias})
        return solo(nets[kind], [7, 8, 9], params, {"threshold": TAU, "eos_policy": policy, **kw})

    for bias in (2.0, 4.0, 6.0):
        plain = ask("none", bias)
        assert tokens(plain).count(EOS) <= 1 and EOS not in tokens(plain)[:-1]
        if plain.finish_reason == "stop":
            assert tokens(plain)[-1] == EOS
        assert facts(ask("min_progress", bias, eos_progress=0.0)) == facts(plain)
        last = ask("confidence_zero", bias)
        assert facts(ask("min_progress", bias, eos_progress=1.0)) == facts(last)
        assert len(tokens(last)) >= len(tokens(plain)) or last.finish_reason == "stop"
    assert EOS in tokens(ask("none", 6.0)), "the cases above must see an end-of-text"
    never = ask("suppress", 30.0)
    assert len(tokens(never)) == 24 and EOS not in tokens(never)
    forced = ask("confidence_zero", 60.0)
    assert tokens(forced) == [EOS] and forced.seq.metrics.forwards == 1
    later = solo(nets[kind], [7, 8], greedy(24, logit_bias={EOS: 60.0}, min_tokens=5), {})
    assert len(tokens(later)) == 6 and tokens(later)[-1] == EOS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_preemption_changes_nothing(nets, kind, cache):
    full = "full" in kind
    if cache == "none" and not full:
        pytest.skip("one cache")
    options = {"threshold": TAU} | ({"cache": cache, "block_length": 6} if full else {})
    texts, params = prompts(6, seed=2), greedy(30, ignore_eos=True)
    eng = engine(nets[kind], slots=140, prefix_caching=False)
    method = make("diffusion", eng.host, options)
    streams = [eng.add(p, params, method)[0] for p in texts[:3]]
    for p in texts[3:]:  # each more urgent than what runs
        for _ in range(4):
            eng.step()
        streams += eng.add(p, params, method, priority=-len(streams))
    while eng.busy:
        eng.step()
    for text, stream in zip(texts, streams, strict=True):
        assert facts(stream) == facts(solo(nets[kind], text, params, options))
    assert eng.runner.alloc.used == 0
    assert eng.scheduler.preemptions > 0 or cache == "none"


@pytest.mark.parametrize("kind", KINDS)
def test_abort_frees_every_slot(nets, kind):
    eng = engine(nets[kind], prefix_caching=False)
    options = {"cache": "dual"} if "full" in kind else {}
    method = make("diffusion", eng.host, options)
    streams = [s for p in prompts(4) for s in eng.add(p, greedy(30, ignore_eos=True, n=2), method)]
    for _ in range(3):
        eng.step()
    for stream in streams:
        eng.abort(stream)
    assert not eng.busy and eng.runner.alloc.used == 0


def test_blocks_are_shared_by_choices_and_requests(nets):
    prompt = prompts(1, seed=3)[0] * 8
    eng = engine(nets["block"])
    job = (prompt, greedy(10, n=2, ignore_eos=True), "diffusion", {"threshold": TAU})
    first, second = run(eng, [job])[0], run(eng, [job])[0]
    assert len({tuple(tokens(s)) for s in first + second}) == 1
    assert second[0].seq.metrics.cached_tokens >= len(prompt) - 16 - 4
    assert first[1].seq.metrics.cached_tokens == len(prompt) // 4 * 4 - 4


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_tokens_never_change(nets, kind):
    eng = engine(nets[kind])
    method = make("diffusion", eng.host, {"threshold": TAU, "block_length": 4})
    (stream,) = eng.add(prompts(1)[0], greedy(30, ignore_eos=True), method)
    seen, turns = [], 0
    while eng.busy:
        for progress in eng.step():
            seen += progress.tokens
            turns += bool(progress.tokens)
            assert tokens(stream) == seen
    assert len(seen) == 30 and turns > 1


@pytest.mark.parametrize("kind", ["full", "block-shift"])
def test_logprobs_are_those_of_the_deciding_forward(nets, kind):
    prompt = prompts(1, seed=12)[0]
    length = {"full": 6, "block-shift": 8}[kind]
    want = reference(nets[kind], prompt, 14, length=length)
    options = {"threshold": TAU, "block_length": length}
    options |= {"cache": "none"} if kind == "full" else {}
    got = solo(nets[kind], prompt, greedy(14, logprobs=2), options).seq
    assert len(got.logprobs) == len(want[0])
    for token, top, value in zip(want[0], got.logprobs, want[2], strict=True):
        assert top[token] == pytest.approx(value, abs=1e-4) and len(top) == 2 and MASK not in top


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_infill(nets, cache):
    net = nets["full"]
    prompt = [7, 9, MASK, MASK, 11, 13, MASK, 8]
    options = {"infill": True, "cache": cache, "block_length": 3, "threshold": 1.01}
    stream = solo(net, prompt, greedy(5, ignore_eos=True), options)
    filled = stream.seq.tokens[:8]
    assert MASK not in stream.seq.tokens
    assert [filled[i] for i in (0, 1, 4, 5, 7)] == [7, 9, 11, 13, 8]
    assert len(tokens(stream)) == 5 and min(stream.seq.step_map) == 3
    if cache == "none":
        ids = prompt + [MASK] * 5
        for window in ((2, 3), (6,)):
            while todo := [i for i in window if ids[i] == MASK]:
                out = plain_logits(net, ids)[todo]
                out[:, MASK] = -torch.inf
                best = int(torch.softmax(out, -1).max(-1).values.argmax())
                ids[todo[best]] = int(out[best].argmax())
        assert filled == ids[:8]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_the_cache_promises(nets, kind):
    prompt, n = [7] * 12, 16
    full = "full" in kind
    shift = int(nets[kind].config.shift)
    for cache in ("none", "prefix", "dual") if full else ("auto",):
        options = {"cache": cache, "threshold": 1.01} | ({"block_length": 8} if full else {})
        rows = solo(nets[kind], prompt, greedy(n, ignore_eos=True), options).seq.metrics.rows
        if full:
            later = {"none": 28 + 28, "prefix": 16 + 8, "dual": 8 + 8}[cache]
            later += 2 * shift * (cache != "none")
            assert rows == 2 * 28 + 7 * later
        elif shift:
            assert rows == 3 * (8 + 8) + (3 + 7 + 3) * 9  # windows of 4, 8 and 4 tokens
        else:
            assert rows == 12 + 4 * 4 + 3 * (4 + 4 * 4)


BAD = [
    ("full", {"block_length": 0}, OptionError), ("full", {"threshold": -1}, OptionError),
    ("full", {"threshold": "x"}, OptionError), ("full", {"cache": "block"}, OptionError),
    ("full", {"steps": 4}, OptionError),
    ("full", {"unmask": "fixed", "threshold": 0.5}, OptionError),
    ("full", {"unmask": "best"}, OptionError), ("full", {"blocklength": 4}, InputError),
    ("full", {"vicinity": 4}, OptionError), ("full", {"cache": "none", "refresh": 4}, OptionError),
    ("block", {"block_length": 5}, OptionError), ("block", {"cache": "none"}, OptionError),
    ("block", {"cache": "dual"}, OptionError), ("block", {"infill": True}, OptionError),
    ("block", {"refresh": 2}, OptionError),
]


@pytest.mark.parametrize("kind, options, error", BAD)
def test_wrong_options_are_refused(nets, kind, options, error):
    with pytest.raises(error):
        make("diffusion", engine(nets[kind]).host, options)


def test_wrong_models_and_prompts_are_refused(nets):
    with pytest.raises(UnsupportedError, match="mask_token_id"):
        make("diffusion", engine(model(stretto={"attention": "full"})).host, {})
    with pytest.raises(UnsupportedError, match="causal"):
        make("diffusion", engine(model()).host, {})
    for kind in KINDS:
        with pytest.raises(PromptError, match=str(MASK)):
            solo(nets[kind], [7, MASK, 8], greedy(4), {})
        with pytest.raises(PromptError, match="512"):
            solo(nets[kind], [7] * 100, greedy(413), {})
        stream = solo(nets[kind], [7] * 500, greedy(12, ignore_eos=True), {"threshold": 0.0})
        assert len(tokens(stream)) == 12
    with pytest.raises(CapacityError, match="cache=none"):
        solo(nets["full"], [7] * 40, greedy(100), {}, slots=230)
    options, params = {"cache": "none", "threshold": 0.0}, greedy(100, ignore_eos=True)
    stream = solo(nets["full"], [7] * 40, params, options, slots=230)
    assert len(tokens(stream)) == 100


def test_listing():
    info = METHODS["diffusion"]
    assert not info.lossless and info.kinds == ("full", "block") and info.purpose
    assert {o.name: o for o in info.options}["unmask"].default == "threshold"
