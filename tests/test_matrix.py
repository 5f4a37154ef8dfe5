"""The property matrix: every registered method goes through every row. A new method adds nothing here.

Exemptions are capabilities declared on the class (lossless, kinds, grammar); CASES lists option sets worth running.
"""

import random

import pytest

from stretto.decoding.registry import METHODS, make
from stretto.engine.params import SamplingParams
from tiny import EOS, MASK, Letters, engine, greedy, model, run, tokens

CASES = {
    "draft": [
        {"model": "other"}, {"model": "other", "acceptance": "coupled"},
        {"model": "other", "acceptance": "coupled", "draft_method": "ppd", "draft_adapter": "other"},
    ],
    "specmemo": [
        {"model": "other", "budget": "400KiB", "context": 150, "num_draft_tokens": 4},
        {"drafter": "suffix", "budget": "170KiB", "context": 200},
    ],
    "mirror": [{"model": "other", "early_top_k": 3}],
    "ppd": [{}, {"tree_budget": 14}],
    "hidden_transfer": [{}, {"tree_budget": 11}],
    "medusa": [{}, {"topk": 3}],
    "clover": [{}, {"topk": 3, "tree_size": 6, "top_p": 1.0, "min_ratio": 0.0}, {"version": 2}],
    "eagle": [{"version": 1}, {"topk": 3, "depth": 3}],
    "jacobi_forcing": [{}, {"block_size": 3, "num_blocks": 3, "spawn_ratio": 0.5, "max_candidates": 2, "init": "pad"}],
}
TEXT = [5, 9, 7, 5, 9, 7, 5, 9, 7, 11, 5, 9]


def cases(*, lossless: bool = False) -> list:
    out = []
    for name, info in METHODS.items():
        if lossless and not info.lossless:
            continue
        for kind in info.kinds:
            for options in CASES.get(name, [{}]):
                label = "-".join([name, kind, *(str(v) for v in options.values())])
                out.append(pytest.param(name, kind, options, id=label))
    return out


NETS = {
    "causal": lambda: model(stretto={"mask_token_id": MASK}),
    "full": lambda: model(stretto={"attention": "full", "mask_token_id": MASK}),
    "block": lambda: model(stretto={"attention": "block", "block_size": 4, "mask_token_id": MASK}),
}


@pytest.fixture(scope="module")
def nets():
    return {kind: make_net() for kind, make_net in NETS.items()}


def prompts(n: int, seed: int = 0):
    rng = random.Random(seed)
    return [[rng.choice([5, 6, 7, 9, 11, 13]) for _ in range(rng.randint(1, 40))] for _ in range(n)]


def solo(net, prompt, params, name, options, **kw):
    return run(engine(net, **kw), [(prompt, params, name, options)])[0][0]


@pytest.mark.parametrize("name, kind, options", cases())
def test_alone_equals_mixed_batch(nets, name, kind, options):
    net, texts = nets[kind], prompts(4)
    others = [m for m, info in METHODS.items() if kind in info.kinds and not CASES.get(m)]
    jobs = [(t, greedy(20), name, options) for t in texts]
    mates = [(t, greedy(15), m, {}) for t, m in zip(prompts(6, 1), others * 6, strict=False)]
    eng = engine(net)
    mixed = run(eng, [job for pair in zip(jobs, mates, strict=False) for job in pair])[::2]
    for job, (stream,) in zip(jobs, mixed, strict=True):
        alone = solo(net, *job)
        assert tokens(stream) == tokens(alone)
        assert stream.finish_reason == alone.finish_reason
    assert eng.runner.alloc.used == (eng.prefix.slots if eng.prefix else 0)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name, kind, options", cases(lossless=True))
def test_lossless_equals_plain_decoding(nets, name, kind, options, batch, temperature):
    if temperature and options.get("acceptance", "coupled") == "rejection":
        pytest.skip("rejection follows the law, not the draws: tested by its law")
    if temperature and name == "draft" and not options.get("acceptance"):
        pytest.skip("rejection follows the law, not the draws: tested by its law")
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=7, ignore_eos=True)
    texts = prompts(batch, 3)
    got = run(engine(nets[kind]), [(t, params, name, options) for t in texts])
    plain, how = METHODS[name].reference
    want = run(engine(nets[kind]), [(t, params, plain, how) for t in texts])
    assert [tokens(s) for (s,) in got] == [tokens(s) for (s,) in want]


@pytest.mark.parametrize("name, kind, options", cases())
def test_max_tokens_is_exact(nets, name, kind, options):
    for n in (1, 2, 3, 7, 16):
        stream = solo(nets[kind], TEXT, greedy(n, ignore_eos=True), name, options)
        assert len(tokens(stream)) == n and stream.finish_reason == "length"


@pytest.mark.parametrize("name, kind, options", cases())
def test_stop_inside_a_commit(nets, name, kind, options):
    whole = tokens(solo(nets[kind], TEXT, greedy(24, ignore_eos=True), name, options))
    for at in (0, 3, 10):
        stop = whole[at]
        first = whole.index(stop)
        params = greedy(24, ignore_eos=True, stop_token_ids=[stop])
        stream = solo(nets[kind], TEXT, params, name, options)
        assert tokens(stream) == whole[: first + 1] and stream.finish_reason == "stop"
        text = Letters().push(whole)
        params = greedy(24, ignore_eos=True, stop=[text[at : at + 2]])
        stream = solo(nets[kind], TEXT, params, name, options)
        assert stream.stops.finish() == text[: text.index(text[at : at + 2])]


@pytest.mark.parametrize("name, kind, options", cases())
def test_seed_repeats(nets, name, kind, options):
    def sample(seed):
        params = SamplingParams(max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True, n=2)
        return [tokens(s) for s in run(engine(nets[kind]), [(TEXT, params, name, options)])[0]]

    first = sample(1)
    assert first == sample(1)
    assert first[0] != first[1], "choices draw their own numbers"
    assert first != sample(2)


@pytest.mark.parametrize("name, kind, options", cases())
def test_preemption_changes_nothing_and_frees_everything(nets, name, kind, options):
    net, texts = nets[kind], prompts(5, 5)
    jobs = [(t, greedy(40, ignore_eos=True), name, options) for t in texts]
    eng = engine(net, slots=260, prefix_caching=False)
    tight = run(eng, jobs)
    for job, (stream,) in zip(jobs, tight, strict=True):
        assert tokens(stream) == tokens(solo(net, *job))
    assert eng.runner.alloc.used == 0


@pytest.mark.parametrize("name, kind, options", cases())
def test_cancel_frees_every_slot_and_disturbs_nobody(nets, name, kind, options):
    net, texts = nets[kind], prompts(4, 6)
    eng = engine(net, prefix_caching=False)
    method = make(name, eng.host, options)
    streams = [eng.add(t, greedy(30, ignore_eos=True, n=2), method) for t in texts]
    for turn in range(200):
        if not eng.busy:
            break
        eng.step()
        if turn == 3:
            eng.abort(streams[1][0])
            eng.abort(streams[1][0])
            eng.abort(streams[2][1])
    assert not eng.busy and eng.runner.alloc.used == 0
    for i in (0, 3):
        assert tokens(streams[i][0]) == tokens(solo(net, texts[i], greedy(30, ignore_eos=True), name, options))


@pytest.mark.parametrize("name, kind, options", cases())
def test_streamed_equals_whole(nets, name, kind, options):
    eng = engine(nets[kind])
    (stream,) = eng.add(TEXT, greedy(24, ignore_eos=True), make(name, eng.host, options), decode_text=True)
    seen, sent = [], ""
    while eng.busy:
        for progress in eng.step():
            seen += progress.tokens
            assert stream.stops.text.startswith(sent)
            sent = stream.stops.text[: stream.stops.safe]
    whole = tokens(solo(nets[kind], TEXT, greedy(24, ignore_eos=True), name, options))
    assert seen == whole == tokens(stream)
    assert stream.stops.finish() == Letters().push(whole)
    steps = stream.seq.step_map
    assert len(steps) == len(whole) and min(steps) >= 0 and max(steps) < stream.seq.metrics.forwards


@pytest.mark.parametrize("name, kind, options", cases())
def test_prefix_cache_and_chunked_prefill_change_nothing(nets, name, kind, options):
    net = nets[kind]
    long = prompts(1, 9)[0] * 4
    want = tokens(solo(net, long, greedy(16, ignore_eos=True), name, options, prefix_caching=False))
    eng = engine(net, max_rows=32)
    for _ in range(2):
        (got,) = run(eng, [(long, greedy(16, ignore_eos=True), name, options)])[0]
        assert tokens(got) == want
    assert EOS not in long
