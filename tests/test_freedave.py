"""FreeDave against static decoding, and against the fewest forwards that a brute-force walk finds."""

import random

import pytest
import torch

from stretto.decoding.registry import METHODS, make
from stretto.engine.params import SamplingParams
from stretto.errors import CapacityError, OptionError, PromptError, UnsupportedError
from stretto.models.context import plain_logits
from tiny import MASK, V, engine, greedy, model, run, tokens

KINDS = {
    "full": {"attention": "full", "mask_token_id": MASK},
    "full-shift": {"attention": "full", "shift": True, "mask_token_id": MASK},
    "block": {"attention": "block", "block_size": 4, "mask_token_id": MASK},
    "block-shift": {"attention": "block", "block_size": 8, "shift": True, "mask_token_id": MASK},
}
STATIC = {"unmask": "fixed"}


@pytest.fixture(scope="module")
def nets():
    shape = {"scale": 2.0, "tie_word_embeddings": False}
    return {kind: model(stretto=section, **shape) for kind, section in KINDS.items()}


def prompts(n, seed=0):
    rng = random.Random(seed)
    return [[rng.randint(5, V - 1) for _ in range(rng.randint(1, 21))] for _ in range(n)]


def both(net, texts, params, options, base, **kw):
    got = run(engine(net, **kw), [(t, params, "freedave", options) for t in texts])
    want = run(engine(net), [(t, params, "diffusion", base) for t in texts])
    return [s for (s,) in got], [s for (s,) in want]


def shared(options):
    return {k: v for k, v in options.items() if k not in ("draft_steps", "eager")}


CASES = [
    *(("full" + s, {"cache": c, "block_length": n}) for s in ("", "-shift") for c, n in
      (("none", 5), ("prefix", 6), ("dual", 6))),
    ("block", {}), ("block", {"block_length": 3}), ("block-shift", {}), ("block", {"eager": False}),
    ("block", {"score": "margin"}), ("block", {"score": "position"}), ("full", {"score": "neg_entropy"}),
    ("block-shift", {"score": "random"}), ("block-shift", {"steps": 3}), ("full", {"steps": 2, "block_length": 7}),
    ("block", {"unmask": "threshold", "threshold": 0.2}),
    ("full", {"unmask": "threshold", "threshold": 0.2, "cache": "none"}),
]


@pytest.mark.parametrize("kind, options", CASES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_text_is_that_of_static_decoding(nets, kind, options, temperature):
    params = SamplingParams(max_tokens=19, temperature=temperature, seed=4, ignore_eos=True)
    base = {**STATIC, **shared(options)}
    got, want = both(nets[kind], prompts(3, 3), params, {"draft_steps": 5, **options}, base)
    assert [tokens(s) for s in got] == [tokens(s) for s in want]
    cost = [sum(s.seq.metrics.forwards for s in streams) for streams in (got, want)]
    assert cost[0] <= cost[1]
    if temperature == 0 and not options.keys() & {"steps", "threshold"} and options.get("score") != "random":
        assert cost[0] < cost[1], "something must be saved somewhere"


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_end_of_text_logprobs_and_penalties_follow(nets, backend):
    for kind in ("full", "block"):
        params = greedy(16, logit_bias={3: 2.0}, logprobs=2, presence_penalty=0.7)
        cache = {"cache": "dual"} if kind == "full" else {}
        got, want = both(
            nets[kind], prompts(3, 5), params, {"draft_steps": 4, **cache}, {**STATIC, **cache}, backend=backend
        )
        assert "stop" in {s.finish_reason for s in want}
        for a, b in zip(got, want, strict=True):
            assert tokens(a) == tokens(b) and a.finish_reason == b.finish_reason
            for x, y in zip(a.seq.logprobs, b.seq.logprobs, strict=True):
                assert x.keys() == y.keys() and x == pytest.approx(y, abs=1e-4)
            assert max(a.seq.step_map) < a.seq.metrics.forwards <= b.seq.metrics.forwards


def laws(net, ids, at):
    out = plain_logits(net, ids)[[i - net.config.shift for i in at]]
    out[:, MASK] = -torch.inf
    return torch.softmax(out.double(), -1)


def walk(net, prompt, n):
    """Static decoding by the definition: the states with their windows, and what each one's laws
    expect of every masked position of its window, the best first."""
    size = net.config.block_size if net.config.attention == "block" else n
    ids, out, end = list(prompt), [], len(prompt) + n
    start = len(prompt)
    while start < end:
        stop = min((start // size + 1) * size if size < n else end, start + size)
        ids += [MASK] * (stop - len(ids))
        while todo := [i for i in range(start, min(stop, end)) if ids[i] == MASK]:
            p = laws(net, ids, todo)
            order = sorted(range(len(todo)), key=lambda j: -p[j].max())
            out.append(([(todo[j], int(p[j].argmax())) for j in order], min(stop, end)))
            ids[todo[order[0]]] = int(p[order[0]].argmax())
        start = stop
    return out


def fewest(states, d, eager):
    """Forwards of the greedy draft-and-verify walk with d branches over a known static path."""
    at = forwards = previous = 0
    while at < len(states):
        if forwards == 0 or states[at][1] != states[previous][1]:
            guess = []  # a new window: no laws yet
        else:
            left = {i for i, _ in states[at][0]}
            guess = [g for g in states[previous][0] if g[0] in left]
        reach = at  # the furthest state among the branches that is right
        for depth in range(1, d):
            if depth > len(guess) or reach + 1 >= len(states):
                break
            same_window = states[reach + 1][1] == states[at][1]
            if guess[depth - 1] != states[reach][0][0] or not (same_window or eager):
                break
            reach += 1
            if not same_window:
                break
        previous, at, forwards = reach, reach + 1, forwards + 1
    return forwards


@pytest.mark.parametrize("kind, eager", [("full", False), ("block", False), ("block", True), ("block-shift", True)])
def test_forwards_are_the_brute_force_minimum_and_fall_with_depth(nets, kind, eager):
    net, n = nets[kind], 16
    cache = {"cache": "none"} if kind == "full" else {}
    for prompt in prompts(3, seed=11):
        states, counts = walk(net, prompt, n), []
        for d in (1, 2, 4, 8):
            options = {"draft_steps": d, "eager": eager, **cache}
            (stream,) = run(engine(net), [(prompt, greedy(n, ignore_eos=True), "freedave", options)])[0]
            assert stream.seq.metrics.forwards == fewest(states, d, eager)
            counts.append(stream.seq.metrics.forwards)
        assert counts[0] == n and counts == sorted(counts, reverse=True)


def test_branch_laws_are_those_of_separate_forwards(nets):
    """Also with a finished block that only one branch has."""
    for kind in ("full", "block", "block-shift"):
        net = nets[kind]
        eng = engine(net)
        cache = {"cache": "none"} if kind == "full" else {}
        method = make("freedave", eng.host, {"draft_steps": 6, **cache})
        eng.add(prompts(1, 9)[0], greedy(13, ignore_eos=True), method)
        seen, commit = 0, method.commit

        def check(seqs, steps, outcomes, net=net, commit=commit):
            nonlocal seen
            (step,), (outcome,) = steps, outcomes
            rows = iter(outcome.logits)
            for canvas, ask in zip(step.extra.canvases, step.extra.asks, strict=True):
                want = plain_logits(net, canvas.ids)[[i - net.config.shift for i in ask.positions]]
                for row in want:
                    torch.testing.assert_close(next(rows), row, atol=1e-4, rtol=1e-4)
                seen += 1
            return commit(seqs, steps, outcomes)

        method.commit = check
        while eng.busy:
            eng.step()
        assert seen > 6


def test_depth_adapts_to_the_cost_of_rows_and_says_nothing_false(nets):
    eng = engine(nets["block"], plan=True)
    method = make("freedave", eng.host, {"draft_steps": 4})
    (stream,) = eng.add([7, 8, 9], greedy(40, ignore_eos=True), method)
    method._costs.table = lambda context, rows: [float(n) for n in range(rows + 1)]  # every row costs a forward
    while eng.busy:
        eng.step()
    assert stream.seq.metrics.drafted <= 4 and stream.seq.metrics.forwards >= 36
    method._costs.table = lambda context, rows: [1.0] * (rows + 1)  # rows are free
    (free,) = eng.add([7, 8, 9], greedy(40, ignore_eos=True), method)
    while eng.busy:
        eng.step()
    assert tokens(free) == tokens(stream) and free.seq.metrics.drafted > 20


def test_wrong_options_models_and_prompts_are_refused(nets):
    bad = [
        ("full", {"cache": "block"}), ("block", {"cache": "dual"}), ("block", {"block_length": 5}),
        ("block", {"unmask": "threshold", "steps": 2}), ("block", {"threshold": 0.9}), ("block", {"draft_steps": 0}),
    ]
    for kind, options in bad:
        with pytest.raises(OptionError):
            make("freedave", engine(nets[kind]).host, options)
    with pytest.raises(UnsupportedError, match="causal"):
        make("freedave", engine(model()).host, {})
    with pytest.raises(PromptError, match=str(MASK)):
        run(engine(nets["block"]), [([7, MASK], greedy(4), "freedave", {})])
    with pytest.raises(CapacityError, match="cache=none"):
        run(engine(nets["full"], slots=230), [([7] * 40, greedy(100), "freedave", {})])


def test_a_small_row_budget_takes_branches_away_and_says_so(nets):
    params = greedy(16, ignore_eos=True)
    job = ([7, 8, 9], params, "freedave", {"draft_steps": 8})
    (tight,) = run(engine(nets["block"], max_rows=16), [job])[0]
    (wide,) = run(engine(nets["block"]), [job])[0]
    assert tokens(tight) == tokens(wide) and any("row budget" in n for n in tight.seq.metrics.notes)


def test_listing():
    info = METHODS["freedave"]
    assert info.lossless and info.reference == ("diffusion", {"unmask": "fixed"}) and info.kinds == ("full", "block")
