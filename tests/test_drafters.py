"""Drafters with trained parts: what they propose equals a slow computation from the whole text, at every step."""

import pytest
import torch
import torch.nn.functional as F

from stretto.decoding.guessing import Growth
from stretto.decoding.registry import make
from stretto.errors import OptionError
from stretto.models.context import PackedContext, packed
from stretto.models.heads import CloverHeads, EagleLayer, MedusaHeads, run_layers
from tiny import engine, greedy, model, random_part, run, tokens

TEXT = [5, 9, 7, 5, 9, 7, 5, 9, 7, 11, 5, 9, 6, 13, 40, 41]


def features(net, text, taps=(-1,)):
    """[n, H] for each tap."""
    tapped = {}
    n = len(text)
    tapped[-1] = net.hidden(torch.tensor(text), torch.arange(n), packed(net.config, [n]), taps=taps, tapped=tapped)
    return [tapped[t] for t in taps]


def slow_medusa(net, adapter, text, depth):
    part = adapter.into(MedusaHeads(net.config, **adapter.config))
    h = part(features(net, text[:-1])[0][-1:])
    return net.head(h[0, :depth]).argmax(-1).tolist()


def slow_clover(net, adapter, text, depth):
    part = adapter.into(CloverHeads(net.config, **adapter.config))
    vectors, n = F.normalize(net.model.embed_tokens.weight, dim=-1), len(text) - 1
    x = part.entry(features(net, text[:-1])[0], vectors[text[1:]])
    h = run_layers(part.layers, x, net.rotary(torch.arange(n), x.dtype), PackedContext([n]))[-1:]
    out, token = [], text[-1]
    for i in range(1, depth + 1):
        h = part.head(i, h, vectors[[token]])
        token = int(net.head(part.out(h)).argmax())
        out.append(token)
    return out


def slow_eagle(net, adapter, text, depth):
    part = adapter.into(EagleLayer(net.config, **adapter.config))
    n, out = len(text) - 1, []
    g = part.feature(features(net, text[:-1], part.taps))
    mask = torch.ones(1, n, n, dtype=torch.bool).tril()
    for d in range(depth):
        ahead = [*text, *out]
        embeds = [net.embed(torch.tensor([ahead[min(i + 1 + j, len(ahead) - 1)] for i in range(n)])) for j in range(d + 1)]
        angles = [net.rotary(torch.arange(n) + j, g.dtype) for j in range(d + 1)]
        out.append(int(net.head(part.out(part.unroll(g, embeds, angles, mask)[-1][-1:])).argmax()))
    return out


CASES = [
    ("medusa", "medusa", {}, slow_medusa, 4), ("clover", "clover", {"tree_size": 3}, slow_clover, 3),
    ("clover", "clover2", {"version": 2, "tree_size": 5}, slow_clover, 5),
    ("eagle", "eagle", {"version": 1, "depth": 3}, slow_eagle, 3), ("eagle", "eagle3", {"depth": 3}, slow_eagle, 3),
]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name, kind, options, slow, depth", CASES, ids=[c[1] for c in CASES])
def test_drafts_equal_a_slow_computation(name, kind, options, slow, depth, backend):
    """After rejections, acceptances, chunked prefill, shared prefixes and in a batch."""
    net = model()
    eng, adapter = engine(net, backend=backend, max_rows=40), random_part(net, kind)
    method = make(name, eng.host, options)
    texts = [TEXT, TEXT[::-1] * 3, TEXT[:5]]
    checked, propose = [0, 0], method.propose

    @torch.no_grad()
    def checking(seqs):
        steps = propose(seqs)
        for seq, step in zip(seqs, steps, strict=True):
            if len(step) > 1:
                want = slow(net, adapter, seq.tokens, depth)[: len(step) - 1]
                checked[0] += len(want)
                checked[1] += sum(a != b for a, b in zip(step.tokens[1:], want, strict=True))
        return steps

    method.propose = checking
    for _ in range(2):
        streams = [eng.add(t, greedy(12, ignore_eos=True), method)[0] for t in texts]
        while eng.busy:
            eng.step()
    assert streams[1].seq.metrics.cached_tokens
    before = checked[0]
    for text in (TEXT[::-1], [*TEXT, 3]):  # alone: chains in C, where there are some
        eng.add(text, greedy(12, ignore_eos=True), method)
        while eng.busy:
            eng.step()
    assert checked[0] > before + 20 and (backend == "torch" or name == "medusa" or method._chain is not None)
    assert checked[0] > 60 and checked[1] <= 1, checked  # one tie in float32 may fall the other way


def test_heads_at_their_start_repeat_the_model_and_later_ones_know_the_guess():
    net = model()
    f = features(net, TEXT)[0].detach()
    assert torch.equal(MedusaHeads(net.config, heads=2)(f)[:, 1], f)
    clover = CloverHeads(net.config, augment=0)
    with torch.no_grad():
        clover.decoder.v.weight.zero_()
    vectors = F.normalize(net.model.embed_tokens.weight, dim=-1).detach()
    states = clover.chain(f, [vectors[[7] * len(f)]] * 3)
    assert all(torch.equal(s, f) for s in states)
    torch.nn.init.normal_(clover.decoder.v.weight)
    first, second = (clover.chain(f, [vectors[[7] * len(f)], vectors[[t] * len(f)]]) for t in (5, 6))
    assert torch.equal(first[0], second[0]) and not torch.allclose(first[1], second[1])
    first[1].sum().backward()
    assert clover.decoder.q.weight.grad.abs().sum() > 0, "the query decides"
    zero = clover.decoder.weigh(*[torch.zeros(1, 32)] * 3)
    assert zero.isfinite().all()


def test_trees_keep_to_their_rules(monkeypatch):
    net = model()
    eng = engine(net)
    options = {"topk": 4, "tree_size": 7, "top_p": 0.9, "min_ratio": 0.1}
    method = make("clover", eng.host, options)
    seen, offer_of = [], Growth.offer
    monkeypatch.setattr(Growth, "offer", lambda growth: seen.append(growth) or offer_of(growth))
    run_to_end = eng.add(TEXT, greedy(16, ignore_eos=True), method)
    while eng.busy:
        eng.step()
    assert run_to_end and len(seen) > 5
    for growth in seen:
        offer = offer_of(growth)
        assert len(offer.gains) <= 7 and offer.gains == sorted(offer.gains, reverse=True)
        for i in range(1, len(growth.token)):
            assert growth.gain[i] <= growth.gain[growth.parent[i]]
        assert max(growth.depth) <= 3


def test_depths_that_were_not_trained_are_refused():
    eng = engine(model())
    with pytest.raises(OptionError, match=r"medusa\.heads=9.*at most 4"):
        make("medusa", eng.host, {"heads": 9})
    with pytest.raises(OptionError, match=r"clover\.depth=9.*at most 3"):
        make("clover", eng.host, {"depth": 9})
    make("eagle", eng.host, {"depth": 9})
    assert any("trained for 5" in note for note in eng.host.notes)


def test_planned_equals_plain():
    """With the planner on, whatever it decides."""
    net = model()
    want = tokens(run(engine(net), [(TEXT, greedy(40, ignore_eos=True), "ar", {})])[0][0])
    for name in ("medusa", "clover", "eagle"):
        stream = run(engine(net, plan=True), [(TEXT, greedy(40, ignore_eos=True), name, {})])[0][0]
        assert tokens(stream) == want


def test_the_page_is_written_from_a_result(tmp_path):
    from stretto.bench.drafting_page import BEGIN, END, render, update
    from stretto.errors import InputError

    row = {
        "method": "medusa", "family": "lists", "lossless": True, "speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.6,
        "tokens_per_forward": 3.0, "rows_per_forward": 4.5, "accepted_at": [0.9, 0.6], "extra_parameters": 147456,
        "extra_bytes": 294912, "extra_bytes_per_token": 768, "extra_training_minutes": 5.0,
    }
    slow = row | {"method": "eagle", "speedup": 0.8, "speedup_low": 0.7, "speedup_high": 0.9}
    result = {"model": "zoo:tiny", "totals": [slow, row], "families": [slow, row], "provenance": {"batch": 1}}
    text = render(result, {"rows": [{"shape": "125M", "method": "medusa", "rows": 5, "plain_ms": 8.0, "step_ms": 12.0, "draft_ms": 2.0, "speedup": 2.0}]})
    assert "| `medusa` | 1.50 (1.40-1.60) | 3.00 | 4.50 | 90, 60 % | 0.15 M | 0.29 MB + 768 B a token | 5 min |" in text
    assert "`eagle` on lists 0.80" in text and "| lists | `medusa` 1.50 | - |" in text and "| 125M |" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update(page, result)
    update(page, result)
    assert page.read_text() == f"before\n{BEGIN}\n{render(result)}{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(InputError, match="must hold"):
        update(page, result)


def test_accepted_by_depth_and_extra_costs():
    """Shares of forwards from the step map; what the method says of itself."""
    from types import SimpleNamespace as Of

    from stretto.bench.rows import _accepted_at

    outs = [Of(outputs=[Of(step_map=[0, 0, 0, 1, 2, 2])]), Of(outputs=[Of(step_map=[0, 1])])]
    cell = Of(track=Of(outputs=outs, total=lambda name: 5))
    assert _accepted_at([cell]) == [0.4, 0.2]
    method = make("eagle", engine(model()).host, {})
    adapter = random_part(model(), "eagle3")
    assert method.extra.parameters == adapter.parameters
    assert method.extra.bytes_per_token == 3 * 4 * 32 + 2 * 2 * 8 * 4


def test_a_moved_row_is_read_again():
    """Whoever keeps K/V under the target's slots sees that a slot holds another row now."""
    eng = engine(model())
    method = make("eagle", eng.host, {"depth": 2})
    (stream,) = eng.add(TEXT, greedy(8, ignore_eos=True), method)
    for _ in range(3):
        eng.step()
    slots = stream.seq.view.slots[4:6].copy()
    before = eng.host.written[slots].copy()
    eng.runner._copy(slots, slots + 100)
    assert (eng.host.written[slots + 100] < 0).all() and (eng.host.written[slots] == before).all()
