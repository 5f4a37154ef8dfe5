"""Learn2PD: recorder, filter, oracle, what happens behind an end-of-text; and CD4LM's adaptive decoding."""

import numpy as np
import pytest
import torch

from stretto.decoding.filter import Filter, block_inputs
from stretto.decoding.registry import make
from stretto.decoding.unmask import Candidates
from stretto.errors import InputError, OptionError, UnsupportedError, WeightsError
from stretto.models.adapter import Adapter, Base
from stretto.models.context import plain_logits
from stretto.training.learn2pd import FilterNet, Recording, auc, fit, record, safe_threshold
from tiny import EOS, MASK, engine, greedy, model, run, tokens

KINDS = {
    "full": {"attention": "full", "mask_token_id": MASK},
    "block": {"attention": "block", "block_size": 4, "mask_token_id": MASK},
}
TEXT = [7, 9, 11, 7, 9, 12]


@pytest.fixture(scope="module")
def nets():
    return {k: model(stretto=s, scale=2.0, tie_word_embeddings=False) for k, s in KINDS.items()}


def adapter(net, block, seed=0, **config):
    torch.manual_seed(seed)
    made = FilterNet(block, 6, block)
    about = {"block": block, "hidden": 6, "inputs": ["confidence"], "threshold": 0.5, **config}
    return Adapter("learn2pd", Base.of(net), {n: p.detach() for n, p in made.state_dict().items()}, about), made


def decode(net, options, prompt=TEXT, n=14, part=None, **params):
    eng = engine(net)
    if part is not None:
        eng.host.parts = lambda kind, name: part
    return run(eng, [(prompt, greedy(n, **params), "diffusion", options)])[0][0]


def test_filter_is_the_trained_net_and_looks_at_its_window_alone(nets):
    part, net = adapter(nets["block"], 4)
    c = Candidates(np.array([5, 6]), np.array([0.3, 0.8]), np.zeros(2), np.zeros(2))
    x = block_inputs(["confidence"], c, [9, 11], 8, 4)
    assert x.tolist() == pytest.approx([1.0, 0.3, 1.0, 0.8])
    want = torch.sigmoid(net(torch.from_numpy(x)[None]))[0].detach().numpy()
    assert Filter(part)(x) == pytest.approx(want, abs=1e-6)
    assert Filter(part).final(c, [9, 11], 8) == pytest.approx(want[[1, 3]], abs=1e-6)
    with pytest.raises(WeightsError, match="shapes"):
        Filter(Adapter("learn2pd", part.base, {"first.bias": torch.zeros(6)}, part.config))


@pytest.mark.parametrize("kind, block", [("full", 5), ("block", 4)])
def test_recorder_is_a_brute_force_replay(nets, kind, block):
    net, n = nets[kind], 10
    got = record(net, [TEXT], [n], [EOS], block=block)
    final = tokens(decode(net, {"unmask": "fixed", "block_length": block} | cache(kind), n=n))
    text, ids, rows = TEXT + final, list(TEXT), []
    end, start = len(TEXT) + n, len(TEXT)
    ids += [MASK] * (n if kind == "full" else 0)
    while start < end and len(rows) < 40:
        stop = min(start + block, end) if kind == "full" else (start // block + 1) * block
        ids += [MASK] * (stop - len(ids))
        base = start if kind == "full" else start // block * block
        while todo := [i for i in range(start, min(stop, end)) if ids[i] == MASK]:
            out = plain_logits(net, ids)[todo]
            out[:, MASK] = -torch.inf
            p, best = torch.softmax(out, -1).max(-1)
            seen = np.ones(block, np.float32)
            seen[[i - base for i in todo]] = p
            rows.append((seen, [(i - base, int(t) == text[i]) for i, t in zip(todo, best, strict=True) if i < len(text)]))
            at = int(p.argmax())
            ids[todo[at]] = int(best[at])
            if ids[todo[at]] == EOS:
                end = min(end, todo[at] + 1)
        start = stop
    if kind == "block" or EOS not in final:
        assert len(rows) == len(got.inputs)
    for (seen, labels), x, right, masked in zip(rows, got.inputs, got.right, got.masked, strict=False):
        assert x == pytest.approx(seen, abs=2e-4) or kind == "full"  # full: the default cache is approximate
        if kind == "block":
            assert [(i, bool(right[i])) for i in np.flatnonzero(masked)] == labels


def cache(kind):
    return {"cache": "none"} if kind == "full" else {}


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_writes_the_reference_in_no_more_forwards(nets, kind):
    slow = decode(nets[kind], {"unmask": "fixed", **cache(kind)}, ignore_eos=True)
    ids = ",".join(map(str, tokens(slow)))
    fast = decode(nets[kind], {"unmask": "oracle", "reference": ids, **cache(kind)}, ignore_eos=True)
    assert tokens(fast) == tokens(slow) and fast.seq.metrics.forwards < slow.seq.metrics.forwards
    other = ",".join(str(9 + i % 7) for i in range(14))  # also a text that the model would never write
    assert tokens(decode(nets[kind], {"unmask": "oracle", "reference": other}, ignore_eos=True))[:3] == [9, 10, 11]


@pytest.mark.parametrize("kind", KINDS)
def test_filter_at_one_is_one_token_a_step_and_a_batch_changes_nothing(nets, kind):
    block = {"full": 5, "block": 4}[kind]
    part, _ = adapter(nets[kind], block, threshold=0.35)
    base = {"unmask": "filter", "block_length": block, **cache(kind)}
    one = decode(nets[kind], base | {"threshold": 1.0}, part=part, ignore_eos=True)
    slow = decode(nets[kind], {"unmask": "fixed", "block_length": block, **cache(kind)}, ignore_eos=True)
    assert tokens(one) == tokens(slow) and one.seq.metrics.forwards == slow.seq.metrics.forwards
    eng = engine(nets[kind])
    eng.host.parts = lambda k, name: part
    prompts = [TEXT, [5, 6], [9] * 11]
    mixed = run(eng, [(p, greedy(14, ignore_eos=True), "diffusion", base) for p in prompts])
    for p, (s,) in zip(prompts, mixed, strict=True):
        alone = decode(nets[kind], base, p, part=part, ignore_eos=True)
        assert tokens(s) == tokens(alone) and s.seq.step_map == alone.seq.step_map
    assert mixed[0][0].seq.metrics.forwards < 14


def test_a_filter_for_other_blocks_or_another_base_is_refused(nets):
    part, _ = adapter(nets["block"], 3)
    eng = engine(nets["block"])
    eng.host.parts = lambda kind, name: part
    with pytest.raises(OptionError, match="blocks of 4; this one was trained for 3"):
        make("diffusion", eng.host, {"unmask": "filter"})
    eng.host.parts = lambda kind, name: adapter(model(seed=5), 4)[0]
    with pytest.raises(UnsupportedError, match="trained on"):
        make("diffusion", eng.host, {"unmask": "filter"})
    for bad in ({"unmask": "oracle"}, {"reference": "1"}, {"unmask": "oracle", "reference": "x"},
                {"filter": "zoo:x"}, {"unmask": "cad", "least": 4, "most": 2}, {"after_end": "never"}):
        with pytest.raises(OptionError):
            make("diffusion", eng.host, bad)


@pytest.mark.parametrize("kind", KINDS)
def test_behind_the_end_of_text(nets, kind):
    """"stop" and "none" give the same text, always; "none" pays for the padding."""
    found = 0
    for bias in (2.0, 3.0, 4.0):
        for prompt in (TEXT, [5, 6, 7]):
            ask = {"threshold": 0.3, "block_length": 4, **cache(kind)}
            runs = {
                how: decode(nets[kind], ask | {"after_end": how}, prompt, 20, logit_bias={EOS: bias})
                for how in ("stop", "none", "fill")
            }
            assert tokens(runs["stop"]) == tokens(runs["none"])
            assert {s.finish_reason for s in (runs["stop"], runs["none"])} <= {"stop", "length"}
            found += runs["stop"].finish_reason == "stop"
            assert runs["stop"].seq.metrics.forwards <= runs["none"].seq.metrics.forwards
            assert runs["fill"].seq.metrics.forwards <= runs["none"].seq.metrics.forwards
            assert tokens(runs["fill"]).count(EOS) <= 1
    assert found, "some text must end early"


@pytest.mark.parametrize("kind", KINDS)
def test_adaptive_decoding_has_its_limits(nets, kind):
    ask = {"unmask": "cad", "eos_policy": "none", "block_length": 4, **cache(kind)}
    one = decode(nets[kind], ask | {"threshold": 1.01}, n=12, ignore_eos=True)
    assert one.seq.metrics.forwards == 12
    whole = decode(nets[kind], ask | {"threshold": 0.0}, n=12, ignore_eos=True)
    assert whole.seq.metrics.forwards == (3 if kind == "full" else 4)
    two = decode(nets[kind], ask | {"threshold": 1.01, "least": 2}, n=12, ignore_eos=True)
    assert two.seq.metrics.forwards == 6
    capped = decode(nets[kind], ask | {"threshold": 0.0, "most": 1}, n=12, ignore_eos=True)
    assert capped.seq.metrics.forwards == 12
    late = {"unmask": "cad", "eos_progress": 0.5, "block_length": 4, "threshold": 0.3, **cache(kind)}
    for bias in (2.0, 3.0, 5.0):
        text, free = (
            tokens(decode(nets[kind], late | how, n=20, logit_bias={EOS: bias})) for how in ({}, {"eos_policy": "none"})
        )
        assert len(text) >= len(free)


def test_fit_needs_both_labels_and_learns_what_there_is():
    rng = np.random.default_rng(0)
    x = rng.random((400, 4), np.float32)
    data = Recording(x, x > 0.6, np.ones((400, 4), bool))
    net = fit(data, 8, epochs=300, seed=0, lr=2e-2, held=data)
    p = torch.sigmoid(net(torch.from_numpy(x))).detach().numpy()
    assert auc(p.ravel(), data.right.ravel()) > 0.97
    with pytest.raises(InputError, match="needs both"):
        fit(Recording(x, np.ones((400, 4), bool), np.ones((400, 4), bool)), 8, epochs=1, seed=0)


def test_auc_and_threshold_are_their_definitions():
    rng = np.random.default_rng(1)
    score, label = rng.integers(0, 6, 60) / 6, rng.random(60) < 0.5
    pairs = [(a > b) + (a == b) / 2 for a in score[label] for b in score[~label]]
    assert auc(score, label) == pytest.approx(np.mean(pairs))
    p, right = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([True, True, False, True, True])
    for budget in (0.0, 0.2, 0.26, 1.0):
        t = safe_threshold(p, right, budget)
        assert (~right[p > t]).mean() <= budget
    assert safe_threshold(p, right, 0.0) == pytest.approx(0.75) and safe_threshold(p, ~right, 0.0) == 1.0
