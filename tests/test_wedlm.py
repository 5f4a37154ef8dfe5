"""WeDLM: the reordered streams of training, and decoding whose cache is exact after every commit."""

import pytest
import torch

from stretto.decoding.registry import make
from stretto.errors import OptionError, PromptError, UnsupportedError
from stretto.models.context import PackedContext
from stretto.training.data import Document, pack
from stretto.training.nets import PackedNet
from stretto.training.objectives import Autoregressive
from stretto.training.recovery import CausalRecovery, match_recovery, recovery_mask, reorder
from tiny import MASK, engine, greedy, model, run, tokens

BLOCK = 4
TEXT = [5, 9, 7, 5, 9, 7, 5, 9, 7, 11, 5, 9]
MASKED = {"stretto": {"mask_token_id": MASK}}


@pytest.fixture(scope="module")
def net():
    return model(**MASKED)


def batch(n: int = 6):
    """Answers that begin anywhere in a block, several texts a row."""
    g = torch.Generator().manual_seed(3)
    docs = []
    for _ in range(n):
        size = int(torch.randint(9, 19, (), generator=g))
        docs.append(Document(torch.randint(5, 64, (size,), generator=g).tolist(), int(torch.randint(1, 6, (), generator=g))))
    return pack(docs, 40, pad_id=1)


def test_observed_tokens_stand_before_masked_ones():
    b = batch()
    p = reorder(b, BLOCK, torch.Generator().manual_seed(0))
    seen = 0
    for row in range(len(p.place)):
        real = p.place[row] >= 0
        docs, at, hid = p.docs[row][real], p.positions[row][real], p.hidden[row][real]
        blocks = list(zip(docs.tolist(), (at // BLOCK).tolist(), strict=True))
        for block in dict.fromkeys(blocks):
            inside = [i for i, x in enumerate(blocks) if x == block]
            assert inside == list(range(inside[0], inside[-1] + 1)), "a block stands together"
            order = [(bool(hid[i]), int(at[i])) for i in inside]
            assert order == sorted(order), "observed ascending, then masked ascending"
            seen += len(inside)
        place = p.place[row][real]
        assert torch.equal(p.clean[row][real], b.tokens[row][place]) and (b.answer[row][place] | ~hid).all()
        wanted = {(int(d), int(q) // BLOCK) for d, q, a in zip(b.docs[row], b.positions[row], b.answer[row], strict=True) if a}
        assert set(blocks) == wanted, "the blocks with answer tokens, whole"
    assert seen and p.hidden.any() and not p.hidden.all()
    assert torch.equal(p.weight > 0, p.hidden)


def test_a_stream_row_equals_the_forward_of_decoding(net):
    """Logits of block k of the prediction stream = the clean text before it, then the same reordered block, causal."""
    b = batch()
    p = reorder(b, BLOCK, torch.Generator().manual_seed(0))
    q = p.place.shape[1]
    with torch.no_grad():
        states = PackedNet(net).hidden(
            torch.cat([p.clean.masked_fill(p.hidden, MASK), b.tokens], 1), torch.cat([p.positions, b.positions], 1),
            recovery_mask(p, b, BLOCK),
        )
        checked = 0
        for row in range(len(p.place)):
            groups = {(int(d), int(at) // BLOCK) for d, at in zip(p.docs[row], p.positions[row], strict=True) if d >= 0}
            for doc, block in groups:
                inside = (p.docs[row] == doc) & (p.positions[row] // BLOCK == block)
                before = (b.docs[row] == doc) & (b.positions[row] < block * BLOCK)
                ids = torch.cat([b.tokens[row][before], p.clean[row].masked_fill(p.hidden[row], MASK)[inside]])
                at = torch.cat([b.positions[row][before], p.positions[row][inside]])
                alone = net.hidden(ids, at, PackedContext([len(ids)], "causal"))
                n = int(before.sum())
                assert (states[row, :q][inside] - alone[n:]).abs().max() < 1e-5
                checked += 1
    assert checked > 12


def test_the_memory_stream_has_the_ordinary_loss(net):
    b, g = batch(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        both = CausalRecovery(MASK, BLOCK, ar_weight=1.0)(PackedNet(net), b, torch.Generator().manual_seed(0))
        alone = CausalRecovery(MASK, BLOCK, ar_weight=0.0)(PackedNet(net), b, torch.Generator().manual_seed(0))
        plain = Autoregressive()(PackedNet(net), b, g)
    assert both.value - alone.value == pytest.approx(float(plain.value), abs=1e-4)


def test_filling_behind_the_end_is_for_masks_only(net):
    """The memory rows learn nothing behind a final end-of-text, whatever stands there."""
    losses = []
    for tail in (9, 11):
        b = pack([Document([5, 6, 7, 3, tail], 2)], 8, pad_id=1)
        objective = CausalRecovery(MASK, BLOCK, end_id=3)
        with torch.no_grad():
            whole = objective(PackedNet(net), b, torch.Generator().manual_seed(0)).value
            masks = CausalRecovery(MASK, BLOCK, ar_weight=0.0)(PackedNet(net), b, torch.Generator().manual_seed(0)).value
        losses.append(float(whole - masks))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_cache_is_exact_after_every_commit(net, backend):
    """Keys and values of the cached prefix = those of a causal forward of the final tokens."""
    eng = engine(net, backend=backend, prefix_caching=False)
    reference = engine(net, backend=backend, prefix_caching=False)
    (stream,) = eng.add(TEXT, greedy(30, ignore_eos=True), make("wedlm", eng.host, {"window": 6, "entropy_threshold": 1.5}))
    seq, turns, most = stream.seq, 0, 0
    while eng.busy:
        eng.step()
        if not eng.busy:
            break
        turns, most = turns + 1, max(most, seq.state.pending)
        slots = seq.view.slots.copy()
        text = seq.tokens[: len(slots)]
        assert len(slots) == len(seq.tokens) - seq.state.pending
        pool, want = eng.runner.pool, fresh(reference, text)
        for mine, theirs in zip((pool.k, pool.v), want, strict=True):
            assert (mine[:, slots] - theirs).abs().max() < 1e-5
    assert turns > 3 and most > 1, "several tokens at once, or the test shows nothing"


def fresh(eng, text):
    """Keys and values of ``text``, evaluated by plain decoding in one forward."""
    (stream,) = eng.add(list(text), greedy(2, ignore_eos=True), make("ar", eng.host))
    eng.step()
    slots = stream.seq.view.slots[: len(text)].copy()
    assert len(slots) == len(text)
    out = [x[:, slots].clone() for x in (eng.runner.pool.k, eng.runner.pool.v)]
    eng.abort(stream)
    return out


@pytest.mark.parametrize("window", [1, 5])
def test_rows_stand_in_physical_order(net, window):
    """Final tokens, filled slots, masks: each ascending. One token a forward for a window of one."""
    eng = engine(net)
    method = make("wedlm", eng.host, {"window": window, "entropy_threshold": 2.0, "position_penalty": 0.0})
    proposed = []
    inner = method.propose
    method.propose = lambda seqs: proposed.append(inner(seqs)[0]) or proposed[-1:]
    (stream,) = eng.add(TEXT, greedy(20, ignore_eos=True), method)
    while eng.busy:
        at, before = len(stream.seq.tokens), len(proposed)
        eng.step()
        if len(proposed) == before:
            continue
        step = proposed[-1]
        masked = [t == MASK for t in step.tokens]
        first = masked.index(True)
        assert all(masked[first:]) and list(step.logits) == list(range(first, len(masked)))
        begin = at - sum(not m for m in masked)  # without positions: a chain that ends the final tokens
        where = range(begin, begin + len(masked)) if step.positions is None else step.positions
        known, masks = list(where[:first]), list(where[first:])
        assert known == sorted(known) and masks == sorted(masks) and len(masks) <= window
        assert masks[0] == at, "the first mask follows the final tokens"
    assert (window == 1) != any(s.positions is not None for s in proposed), "some slot was filled behind a gap"
    if window == 1:
        assert stream.seq.metrics.forwards == 20


def test_threshold_zero_is_one_token_a_forward(net):
    (stream,) = run(engine(net), [(TEXT, greedy(15, ignore_eos=True), "wedlm", {"entropy_threshold": 0.0})])[0]
    assert stream.seq.metrics.forwards >= 15 and len(tokens(stream)) == 15
    assert len(set(stream.seq.step_map)) == 15


def test_block_wise_waits_for_the_whole_window(net):
    options = {"window": 5, "entropy_threshold": 2.0, "streaming": False}
    (stream,) = run(engine(net), [(TEXT, greedy(20, ignore_eos=True), "wedlm", options)])[0]
    steps = stream.seq.step_map
    assert len(tokens(stream)) == 20
    for i in range(0, 15, 5):
        assert max(steps[i : i + 5]) < min(steps[i + 5 : i + 10]), "no slot of the next window before this one is full"
    again = run(engine(net), [(TEXT, greedy(20, ignore_eos=True), "wedlm", {**options, "streaming": True})])[0][0]
    assert any(max(again.seq.step_map[: i]) > min(again.seq.step_map[i:]) for i in range(5, 20, 5))


def test_bad_input(net):
    eng = engine(net)
    with pytest.raises(PromptError, match="mask token 4 at position 1"):
        eng.add([5, MASK, 7], greedy(3), make("wedlm", eng.host))
    with pytest.raises(UnsupportedError, match="mask_token_id"):
        make("wedlm", engine(model()).host)
    sliding = {"model_type": "mistral", "sliding_window": 7, "mask_token_id": MASK}
    with pytest.raises(UnsupportedError, match="sliding"):
        make("wedlm", engine(model(**sliding)).host)
    for name, value in (("window", 0), ("entropy_threshold", -0.1), ("position_penalty", -1.0)):
        with pytest.raises(OptionError, match=name):
            make("wedlm", eng.host, {name: value})


def test_suffix_blocks_hide_their_last_candidates():
    """Share 1: behind the first mask of a block no answer token is observed; as many masks as with random places."""
    b = batch()
    p = reorder(b, BLOCK, torch.Generator().manual_seed(0), suffix=1.0)
    assert p.hidden.sum() == reorder(b, BLOCK, torch.Generator().manual_seed(0)).hidden.sum()
    for row in range(len(p.place)):
        groups = {}
        for doc, at, place, hid in zip(p.docs[row], p.positions[row], p.place[row], p.hidden[row], strict=True):
            if doc >= 0 and b.answer[row][place]:
                groups.setdefault((int(doc), int(at) // BLOCK), []).append((int(at), bool(hid)))
        for slots in groups.values():
            assert [h for _, h in sorted(slots)] == sorted(h for _, h in slots), "observed, then masked"


def test_the_probe_is_decoding_with_a_window_of_one(net):
    g = torch.Generator().manual_seed(5)
    prompts = [torch.randint(5, 64, (n,), generator=g).tolist() for n in (5, 9, 7)]
    options = {"window": 1, "entropy_threshold": 0.0}
    streams = [r[0] for r in run(engine(net), [(p, greedy(6, ignore_eos=True), "wedlm", options) for p in prompts])]
    docs = [Document([*p, *tokens(s)], len(p)) for p, s in zip(prompts, streams, strict=True)]
    assert all(match_recovery(PackedNet(net), pack(docs, 20, pad_id=1), mask_id=MASK))
    wrong = [Document([*d.tokens[:-1], (d.tokens[-1] + 1) % 64], d.prompt) for d in docs]
    assert not any(match_recovery(PackedNet(net), pack(wrong, 20, pad_id=1), mask_id=MASK))
