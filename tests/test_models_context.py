"""Cached, chunked, permuted, tree-shaped and packed forwards give the logits of a plain forward."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from model_zoo import BASE
from stretto.errors import OptionError, PromptError, UnsupportedError
from stretto.models.batch import FlatBatch, KVPool
from stretto.models.config import ModelConfig
from stretto.models.context import PackedContext, packed, plain_logits
from stretto.models.pool_context import forward_batch
from stretto.models.transformer import Transformer

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
CONFIGS = {
    "gqa": {},
    "all-kv": dict(num_key_value_heads=4),
    "one-kv": dict(num_key_value_heads=1),
    "window": dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
}


def model(dtype=torch.float64, seed=0, **changes):
    config = ModelConfig.from_hf(BASE | dict(model_type="qwen3", head_dim=8) | changes)
    torch.manual_seed(seed)
    out = Transformer(config)
    with torch.no_grad():
        for p in out.parameters():
            p.copy_(torch.randn_like(p) * 0.4 if p.dim() > 1 else 1 + 0.3 * torch.randn_like(p))
    return out.to(dtype)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request):
    return request.param


@pytest.fixture(params=CONFIGS)
def net(request, dtype):
    return model(dtype, **CONFIGS[request.param])


def plain(net, tokens, mask=None):
    """One dense forward of one text, in the model's own dtype."""
    n = len(tokens)
    kind = net.config.attention if mask is None else mask
    kind = ("block", net.config.block_size) if isinstance(kind, str) and kind == "block" else kind
    ctx = PackedContext([n], kind, windows=net.config.windows)
    with torch.no_grad():
        return net(torch.as_tensor(tokens), torch.arange(n), ctx)


def pool_for(net, slots=256):
    c = net.config
    return KVPool(c.num_hidden_layers, slots, c.num_key_value_heads, c.head_dim, dtype=net.dtype)


@dataclass
class Part:
    """The rows of one sequence: ``sees[i, j]`` = row i sees row j of the part."""

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    context: np.ndarray
    sees: np.ndarray


def batch(*parts, order=None):
    """A FlatBatch of the parts, its rows in ``order``."""
    n = sum(len(p.tokens) for p in parts)
    order = np.arange(n) if order is None else np.asarray(order)
    place = np.argsort(order)
    join = lambda name: np.concatenate([getattr(p, name) for p in parts])[order]
    owner = np.repeat(np.arange(len(parts)), [len(p.tokens) for p in parts])
    starts = np.cumsum([0, *(len(p.tokens) for p in parts)])
    local = [
        place[starts[q] + np.nonzero(p.sees[i])[0]]
        for q, p in enumerate(parts)
        for i in range(len(p.tokens))
    ]
    local = [local[i] for i in order]
    ptr = lambda sizes: np.cumsum([0, *sizes]).astype(np.int32)
    return FlatBatch(
        tokens=join("tokens").astype(np.int64),
        positions=join("positions").astype(np.int32),
        slots=join("slots").astype(np.int32),
        context_of=owner[order].astype(np.int32),
        context=np.concatenate([p.context for p in parts]).astype(np.int32),
        context_ptr=ptr([len(p.context) for p in parts]),
        local=np.concatenate(local).astype(np.int32),
        local_ptr=ptr([len(x) for x in local]),
        logit_rows=np.arange(n, dtype=np.int32),
    )


def chunk(tokens, slots, start, stop, sees=None):
    n = stop - start
    sees = np.tri(n, dtype=bool) if sees is None else sees
    return Part(tokens[start:stop], np.arange(start, stop), slots[start:stop], slots[:start], sees)


def text(n, seed=0):
    return np.random.default_rng(seed).integers(0, BASE["vocab_size"], n)


def close(got, want):
    assert got.shape == want.shape
    limit = TOLERANCE.get(want.dtype, 0)
    assert (got.double() - want.double()).abs().max() <= max(limit, 1e-6) * want.abs().max()


@pytest.fixture
def run(net):
    """forward_batch with logits in the model's own dtype, not rounded to float32."""
    pool = pool_for(net)

    def call(*parts, order=None):
        result = forward_batch(net, pool, batch(*parts, order=order))
        assert result.logits.dtype == torch.float32
        return result.logits

    return call


@pytest.mark.parametrize(
    "sizes", [(19,), (7, 1, 1, 4, 6), (1,) * 19], ids=["whole", "chunks", "single"]
)
@pytest.mark.parametrize("scattered", [False, True])
def test_chunks(net, run, sizes, scattered):
    tokens = text(19)
    slots = np.random.default_rng(1).permutation(256)[:19] if scattered else np.arange(30, 49)
    out, at = [], 0
    for size in sizes:
        out.append(run(chunk(tokens, slots, at, at + size)))
        at += size
    close(torch.cat(out), plain(net, tokens))


def test_hidden_is_exact_to_the_dtype(net, dtype):
    """Taps are not rounded: chunked states equal plain states to 1e-12 (fp64) or 1e-5 (fp32)."""
    tokens, slots, pool = text(17), np.random.default_rng(2).permutation(256)[:17], pool_for(net)
    want = {}
    with torch.no_grad():
        ctx = packed(net.config, [17])
        want[-1] = net.hidden(
            torch.as_tensor(tokens), torch.arange(17), ctx, taps=(0, 1, 2), tapped=want
        )
    got = {tap: [] for tap in want}
    for start, stop in ((0, 5), (5, 6), (6, 17)):
        b = batch(chunk(tokens, slots, start, stop))
        b.taps = (-1, 0, 1, 2)
        for tap, state in forward_batch(net, pool, b).hidden.items():
            got[tap].append(state)
    assert got.keys() == {-1, 0, 1, 2}
    for tap, states in got.items():
        error = (torch.cat(states) - want[tap]).abs().max()
        assert error <= TOLERANCE[dtype] * want[tap].abs().max(), tap


def test_many_sequences_in_one_batch(net, run):
    """Prefill of one, chunk of another, single rows of several of unlike length: each as if
    alone.
    """
    lengths = [1, 3, 9, 14, 22, 40]
    texts = [text(n + 6, seed=n) for n in lengths]
    slots = np.random.default_rng(3).permutation(256)
    starts = np.cumsum([0, *(len(t) for t in texts)])
    where = [slots[a:b] for a, b in itertools.pairwise(starts)]
    for t, w, n in zip(texts, where, lengths, strict=True):
        run(chunk(t, w, 0, n))
    steps = [1, 1, 4, 1, 6, 1]
    parts = [chunk(*a) for a in zip(texts, where, lengths, np.add(lengths, steps), strict=True)]
    got = run(*parts).split(steps)
    for t, n, k, logits in zip(texts, lengths, steps, got, strict=True):
        close(logits, plain(net, t[: n + k])[n:])
    order = np.random.default_rng(4).permutation(sum(steps))
    shuffled = run(*parts, order=order)[np.argsort(order)].split(steps)
    for a, b in zip(got, shuffled, strict=True):
        close(b, a.to(net.dtype))


def test_permuted_rows_of_one_sequence(net, run):
    tokens, slots = text(15), np.arange(15)
    run(chunk(tokens, slots, 0, 5))
    order = np.random.default_rng(5).permutation(10)
    got = run(chunk(tokens, slots, 5, 15), order=order)
    close(got[np.argsort(order)], plain(net, tokens)[5:])


def test_tree(net, run):
    """Every node of a tree gets the logits of its own path."""
    prompt, slots = text(9), np.random.default_rng(6).permutation(64)
    parent = [-1, 0, 0, 1, 1, 2, -1, 6]
    drafts = text(len(parent), seed=9)
    paths = []
    for i, p in enumerate(parent):
        paths.append((paths[p] if p >= 0 else []) + [i])
    sees = np.zeros((len(parent),) * 2, bool)
    for i, path in enumerate(paths):
        sees[i, path] = True
    run(chunk(prompt, slots, 0, 9))
    depth = np.array([len(p) for p in paths])
    got = run(Part(drafts, 8 + depth, slots[9 : 9 + len(parent)], slots[:9], sees))
    for i, path in enumerate(paths):
        close(got[i], plain(net, np.concatenate([prompt, drafts[path]]))[-1])


def test_overwritten_slots_are_read_new(net, run):
    """A row may replace a slot of its own context: readers see the new key."""
    tokens, slots = text(12), np.arange(12)
    run(chunk(tokens, slots, 0, 12))
    changed = tokens.copy()
    changed[4:] = text(8, seed=7)
    got = run(chunk(changed, slots, 4, 12))
    close(got, plain(net, changed)[4:])


def test_full_attention_refresh(dtype):
    """A bidirectional model: rows of a block against the cached rest equals a full forward after a
    refresh.
    """
    net = model(dtype)
    net.config = net.config.changed(attention="full")
    tokens, slots, pool = text(14), np.arange(14), pool_for(net)
    all_ = np.ones((14, 14), bool)
    whole = batch(chunk(tokens, slots, 0, 14, all_))
    want = plain(net, tokens)
    close(forward_batch(net, pool, whole).logits, want)
    rest = np.concatenate([slots[:5], slots[9:]])
    rows = Part(tokens[5:9], np.arange(5, 9), slots[5:9], rest, np.ones((4, 4), bool))
    close(forward_batch(net, pool, batch(rows)).logits, want[5:9])


def test_block_attention_in_blocks(dtype):
    net = model(dtype)
    net.config = net.config.changed(attention="block", block_size=4)
    tokens, slots, pool = text(12), np.arange(12), pool_for(net)
    got = [
        forward_batch(
            net, pool, batch(chunk(tokens, slots, i, i + 4, np.ones((4, 4), bool)))
        ).logits
        for i in (0, 4, 8)
    ]
    close(torch.cat(got), plain(net, tokens))


def test_embeds_replace_tokens(net):
    tokens, slots, pool = text(6), np.arange(6), pool_for(net)
    b = batch(chunk(tokens, slots, 0, 6))
    want = forward_batch(net, pool, b).logits
    b.embeds = net.embed(torch.as_tensor(tokens[[2, 4]])).detach()
    b.embed_rows = np.array([2, 4], np.int32)
    b.tokens = b.tokens.copy()
    b.tokens[[2, 4]] = 0
    b.logit_rows = np.array([5, 1], np.int32)
    close(forward_batch(net, pool, b).logits, want[[5, 1]].to(net.dtype))


# --- packed segments


@pytest.mark.parametrize("lengths", [[6, 6, 6], [9, 2, 5, 1]])
@pytest.mark.parametrize("kind", ["causal", "full", ("block", 3)], ids=str)
def test_packed_segments(net, lengths, kind):
    texts = [text(n, seed=n + i) for i, n in enumerate(lengths)]
    tokens = torch.as_tensor(np.concatenate(texts))
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        got = net(tokens, positions, PackedContext(lengths, kind, windows=net.config.windows))
    for t, logits in zip(texts, got.split(lengths), strict=True):
        n = len(t)
        i, j = np.ogrid[:n, :n]
        mask = {"causal": j <= i, "full": np.ones((n, n), bool)}.get(kind, j // 3 <= i // 3)
        close(logits, plain(net, t, torch.from_numpy(mask)))


def test_masks(net):
    """One mask for all segments, one each, and one over all rows."""
    mask = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    tokens, positions = torch.as_tensor(text(10)), torch.arange(5).repeat(2)
    windows = (None,) * 2
    with torch.no_grad():
        each = net(tokens, positions, PackedContext([5, 5], mask, windows=windows))
        whole = torch.block_diag(*mask.int()).bool()
        over_all = net(tokens, positions, PackedContext([5, 5], whole, windows=windows))
        shared = net(tokens, positions, PackedContext([5, 5], mask[0], windows=windows))
        first = net(tokens[:5], positions[:5], PackedContext([5], mask[0], windows=windows))
    close(over_all, each)
    close(shared[:5], first)
    close(each[:5], first)


def test_gradients_of_padded_segments():
    """Unequal lengths give the gradient of the segments one by one."""
    lengths, grads = [7, 3, 5], []
    tokens = torch.as_tensor(text(15))
    for split in (False, True):
        net = model()
        spans = [(0, 7), (7, 10), (10, 15)] if split else [(0, 15)]
        for a, b in spans:
            sizes = [b - a] if split else lengths
            positions = torch.cat([torch.arange(n) for n in sizes])
            net(tokens[a:b], positions, packed(net.config, sizes)).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_packed_model_equals_plain():
    """pack(): fused and reordered matrices, within rounding."""
    for changes in (
        {},
        dict(tie_word_embeddings=True, attention_bias=True),
        dict(
            model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        ),
    ):
        net = model(torch.float32, **changes)
        want = plain_logits(net, text(9))
        assert not net.packed
        assert net.pack().packed
        close(plain_logits(net, text(9)), want)
        net.pack()


# --- wrong use


def test_errors():
    net = model()
    with pytest.raises(PromptError, match="empty"):
        plain_logits(net, [])
    with pytest.raises(PromptError, match=r"0\.\.60"):
        plain_logits(net, [1, 61])
    with pytest.raises(PromptError, match="lengths"):
        PackedContext([3, 0])
    with pytest.raises(OptionError, match="causal"):
        PackedContext([3], "bidirectional")
    with pytest.raises(OptionError, match="B >= 1"):
        PackedContext([3], ("block", 0))
    with pytest.raises(OptionError, match="mask"):
        PackedContext([3, 3], torch.ones(3, 3, 3, dtype=torch.bool))
    with pytest.raises(OptionError, match="mask"):
        PackedContext([3], torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(PromptError, match="exactly one"):
        net.hidden(None, torch.arange(3), PackedContext([3]))


def test_length_dependent_angles_refuse_a_cache():
    rope = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    net = model(**rope, max_position_embeddings=8)
    tokens, pool = text(10), pool_for(net)
    forward_batch(net, pool, batch(chunk(tokens, np.arange(10), 0, 8)))
    with pytest.raises(UnsupportedError, match="dynamic"):
        forward_batch(net, pool, batch(chunk(tokens, np.arange(10), 8, 10)))
