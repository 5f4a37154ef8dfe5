"""The native forward against the torch one in float64, and the bits of a row against everything around it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from stretto.engine.types import Outcome
from stretto.errors import OptionError, PromptError, UnsupportedError
from stretto.models import native_linear
from stretto.models.batch import FlatBatch, KVPool
from stretto.models.lora import add_lora, merge_lora
from stretto.models.native import NativeForward
from stretto.models.native_linear import PackedLinear, argmax, linear
from stretto.models.pool_context import forward_batch

REASON = NativeForward.supported(tiny.config())
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"NATIVE FORWARD NOT TESTED: {REASON}")
HALVES = REASON is None and native_linear.multiplies_halves()

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MOE = {"model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "qwen3": {},
    "llama-biases-untied": LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "llama3-rope": LLAMA | {"rope_parameters": LLAMA3},
    "qwen2": {"model_type": "qwen2"},
    "mistral-window": {"model_type": "mistral", "sliding_window": 7},
    "qwen3-window": {
        "use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]
    },
    "odd-sizes": LLAMA | {
        "hidden_size": 36, "head_dim": 12, "intermediate_size": 50, "vocab_size": 67, "num_attention_heads": 3, "num_key_value_heads": 1
    },
    "wide-heads": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 72, "intermediate_size": 300},
    "qwen3_moe": MOE | {"norm_topk_prob": True},
    "moe-raw-weights-dense-layer": MOE | {"norm_topk_prob": False, "mlp_only_layers": [0], "num_experts_per_tok": 3},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
}  # fmt: skip


def ids(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, tiny.V, n)


def model(name: str = "qwen3", **changes):
    net = tiny.model(**(FAMILIES[name] | changes))
    with torch.no_grad():
        for key, p in net.named_parameters():
            if key.endswith("bias"):
                p.normal_(0, 0.3)
    return net


def pool_for(net, dtype=torch.float32, slots: int = 512) -> KVPool:
    c = net.config
    return KVPool(c.num_hidden_layers, slots, c.num_key_value_heads, c.head_dim, dtype=dtype)


def rows(tokens, slots, context=(), parent=None, positions=None) -> dict:
    """Rows of one sequence behind the slots ``context``: a chain, or a tree by ``parent``."""
    n = len(tokens)
    parent = range(-1, n - 1) if parent is None else parent
    paths: list[list[int]] = []
    for i, p in enumerate(parent):
        paths.append(paths[p] + [i] if p >= 0 else [i])
    at = [len(context) + len(p) - 1 for p in paths] if positions is None else positions
    return {"tokens": tokens, "slots": slots, "context": context, "paths": paths, "positions": at}


def batch(*parts: dict, **more) -> FlatBatch:
    starts = np.cumsum([0] + [len(p["tokens"]) for p in parts])
    paths = [[i + s for i in path] for p, s in zip(parts, starts, strict=False) for path in p["paths"]]
    cat = lambda key: np.concatenate([np.asarray(p[key], np.int32) for p in parts])
    ptr = lambda lists: np.cumsum([0] + [len(x) for x in lists]).astype(np.int32)
    n = int(starts[-1])
    return FlatBatch(
        tokens=cat("tokens").astype(np.int64), positions=cat("positions"), slots=cat("slots"),
        context_of=np.repeat(np.arange(len(parts), dtype=np.int32), np.diff(starts)),
        context=cat("context"), context_ptr=ptr([p["context"] for p in parts]),
        local=np.concatenate(paths).astype(np.int32), local_ptr=ptr(paths),
        **({"logit_rows": np.arange(n, dtype=np.int32)} | more),
    )  # fmt: skip


def prefill(run, pool, tokens, slots, chunk=None):
    """Logits of every token of a text, ``chunk`` rows at a time."""
    out, step = [], chunk or len(tokens)
    for a in range(0, len(tokens), step):
        part = rows(tokens[a : a + step], slots[a : a + step], slots[:a])
        out.append(run.forward(pool, batch(part)).logits)
    return torch.cat(out)


class Reference:
    """The torch forward in float64."""

    def __init__(self, net):
        self.net = net.double()

    def forward(self, pool, b):
        if b.embeds is not None:
            b = replace(b, embeds=b.embeds.double())
        return forward_batch(self.net, pool, b)


def scenario(run, pool) -> list[torch.Tensor]:
    """Two texts, scattered over the pool; a mixed batch of a tree, a chunk and a single row."""
    slots = np.random.default_rng(1).permutation(pool.slots).astype(np.int32)
    a, b, free = slots[:90], slots[90:110], slots[110:]
    out = [prefill(run, pool, ids(90), a, chunk=40), prefill(run, pool, ids(20, 1), b)]
    tree = rows(ids(6, 2), free[:6], a, parent=[-1, 0, 0, 1, 2, -1])
    chunk = rows(ids(9, 3), free[6:15])
    one = rows(ids(1, 4), free[15:16], b)
    out.append(run.forward(pool, batch(tree, chunk, one)).logits)
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_float64_reference(name):
    net = model(name)
    got = scenario(NativeForward(net), pool_for(net))
    expected = scenario(Reference(net), pool_for(net, torch.float64))
    for x, y in zip(got, expected, strict=True):
        assert (x - y).abs().max() < 2e-5 * max(1, y.abs().max())


@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("halves", [False, None])
def test_bfloat16_weights_and_pool(kv, halves):
    net = model(intermediate_size=72)
    rounded = model(intermediate_size=72)
    with torch.no_grad():
        for key, p in rounded.named_parameters():
            if p.dim() == 2 and "embed" not in key:
                p.copy_(p.bfloat16())
        head = rounded.model.embed_tokens.weight.bfloat16().float()
    run = NativeForward(net, "bfloat16", halves=halves)
    rounded.config = rounded.config.changed(tie_word_embeddings=False)
    rounded.lm_head = torch.nn.Linear(32, 64, bias=False)
    rounded.lm_head.weight = torch.nn.Parameter(head)
    got = scenario(run, pool_for(net, kv))
    expected = scenario(Reference(rounded), pool_for(net, torch.float64))
    for x, y in zip(got, expected, strict=True):
        exact = kv == torch.float32 and not (HALVES and halves is None)
        assert (x - y).abs().max() < (1e-5 if exact else 3e-2) * y.abs().max()


def test_bfloat16_model_is_stored_as_it_is():
    net = model().bfloat16()
    run = NativeForward(net, halves=False)
    assert run.weight_dtype == torch.bfloat16
    got = scenario(run, pool_for(net))
    halves = scenario(NativeForward(net), pool_for(net))
    wide = scenario(NativeForward(model().bfloat16().float()), pool_for(net))
    expected = scenario(Reference(net), pool_for(net, torch.float64))
    for x, y, z, h in zip(got, expected, wide, halves, strict=True):
        assert (x - y).abs().max() < 1e-5 * y.abs().max()
        assert torch.equal(x, z)  # float32 weights that are bfloat16 numbers: same storage, same bits
        assert (h - y).abs().max() < 1e-2 * y.abs().max()


def test_taps_and_embeds():
    net = model()
    table = net.model.embed_tokens.weight.detach()
    part = rows(ids(8), np.arange(8, dtype=np.int32))
    whole = batch(part, taps=(0, 1, 2, -1))
    run = NativeForward(net)
    got = run.forward(pool_for(net), whole)
    expected = Reference(model()).forward(pool_for(net, torch.float64), whole)
    for tap in whole.taps:
        assert (got.hidden[tap] - expected.hidden[tap]).abs().max() < 1e-5 * expected.hidden[tap].abs().max()
    replaced = replace(
        whole, tokens=np.where(np.isin(np.arange(8), [2, 5]), -7, whole.tokens), embed_rows=np.array([5, 2], np.int32),
        embeds=table[whole.tokens[[5, 2]]],
    )
    assert torch.equal(run.forward(pool_for(net), replaced).logits, got.logits)
    some = run.forward(pool_for(net), replace(whole, logit_rows=np.array([6, 1], np.int32), taps=()))
    assert torch.equal(some.logits, got.logits[[6, 1]])
    none = run.forward(pool_for(net), replace(whole, logit_rows=np.zeros(0, np.int32), taps=(2, -1)))
    assert none.logits.shape == (0, tiny.V) and torch.equal(none.hidden[-1], got.hidden[-1])


@pytest.mark.parametrize("name", ["qwen3", "mistral-window", "qwen3_moe", "odd-sizes"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_rows(name, dtype):
    """Whole, in chunks of any size, with other sequences around, in other slots, on other threads."""
    net = model(name)
    run = NativeForward(net, dtype)
    text, other = ids(100), ids(150, 5)
    slots = np.arange(512, dtype=np.int32)
    whole = prefill(run, pool_for(net), text, slots[:100])
    for chunk in (1, 2, 3, 5, 6, 7, 13, 16, 17, 32, 33, 64):
        assert torch.equal(prefill(run, pool_for(net), text, slots[:100], chunk), whole), chunk
    for threads in (2, 3):
        assert torch.equal(prefill(NativeForward(net, dtype, threads), pool_for(net), text, slots[:100], 16), whole)
    mixed = np.random.default_rng(3).permutation(slots)
    pool = pool_for(net)
    prefill(run, pool, text[:70], mixed[:70])
    prefill(run, pool, other[:33], mixed[100:133])
    parts = [
        rows(other[33:40], mixed[133:140], mixed[100:133]), rows(text[70:], mixed[70:100], mixed[:70]),
        rows(other[40:], mixed[200:310]),
    ]  # fmt: skip
    got = run.forward(pool, batch(*parts)).logits
    assert torch.equal(got[7:37], whole[70:])


def test_bits_do_not_depend_on_the_order_of_rows():
    net = model()
    run, pool = NativeForward(net), pool_for(net)
    slots = np.random.default_rng(0).permutation(512).astype(np.int32)
    prefill(run, pool, ids(80), slots[:80])
    ones = [rows(ids(1, s), slots[80 + s : 81 + s], slots[: 10 * s + 1]) for s in range(8)]
    alone = torch.cat([run.forward(pool, batch(p)).logits for p in ones])
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    assert torch.equal(run.forward(pool, batch(*(ones[i] for i in order))).logits, alone[order])


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 1)])
@pytest.mark.parametrize("context", [0, 5, 61, 64, 100])
def test_rows_that_share_tiles_have_the_bits_of_rows_alone(context, heads):
    """A forest of 90 rows, one branch longer than a chunk, in forwards of all; and each path row by row."""
    net = model("wide-heads", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    run, pool, rng = NativeForward(net), pool_for(net), np.random.default_rng(context)
    slots = rng.permutation(512).astype(np.int32)
    if context:
        prefill(run, pool, ids(context), slots[:context])
    parent = [*range(-1, 69), *(int(rng.integers(-1, i)) for i in range(70, 90))]
    tokens = ids(90, 2)
    forest = rows(tokens, slots[100:190], slots[:context], parent)
    got = run.forward(pool, batch(forest)).logits
    for last in (0, 3, 68, 71, 77, 83, 89):
        seen = slots[:context]
        for i, at in enumerate(forest["paths"][last]):
            own = slots[200 + i : 201 + i]
            alone = run.forward(pool, batch(rows(tokens[at : at + 1], own, seen, positions=[context + i]))).logits[0]
            assert torch.equal(alone, got[at]), at
            seen = np.concatenate([seen, own])


@pytest.mark.parametrize("name", ["qwen3", "qwen3-window", "qwen3_moe"])
def test_a_path_of_a_tree_has_the_bits_of_a_chain(name):
    net = model(name)
    run, pool = NativeForward(net), pool_for(net)
    slots = np.random.default_rng(0).permutation(512).astype(np.int32)
    prefill(run, pool, ids(61), slots[:61])
    parent, tokens = [-1, 0, 0, 1, 2, 4, 4, 3], ids(8, 2)
    tree = rows(tokens, slots[100:108], slots[:61], parent)
    got = run.forward(pool, batch(tree)).logits
    for path in tree["paths"]:
        chain = rows(tokens[path], slots[200 : 200 + len(path)], slots[:61])
        assert torch.equal(run.forward(pool, batch(chain)).logits, got[path])
    # the accepted path stays where the tree wrote it: the next row reads it through its table
    path = tree["paths"][6]
    ahead = rows(ids(1, 9), slots[300:301], np.concatenate([slots[:61], slots[100:108][path]]))
    prefill(run, pool, np.concatenate([ids(61), tokens[path]]), slots[400:][: 61 + len(path)])
    plain = rows(ids(1, 9), slots[301:302], slots[400:][: 61 + len(path)])
    assert torch.equal(run.forward(pool, batch(ahead)).logits, run.forward(pool, batch(plain)).logits)


@pytest.mark.parametrize("dtype, halves", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("n, k", [(1, 1), (40, 33), (67, 300), (200, 513)])
def test_linear(n, k, dtype, halves):
    if halves and not HALVES:
        pytest.skip("this machine does not multiply halves")
    torch.manual_seed(0)
    x, w, bias = torch.randn(130, k), torch.randn(n, k).to(dtype), torch.randn(n)
    packed = PackedLinear(w, bias, dtype, halves=halves)
    y = linear(x, packed)
    expected = x.double() @ w.double().T + bias
    if halves:  # closer than with inputs rounded to bfloat16
        rounded = x.bfloat16().double() @ w.double().T + bias
        assert (y - expected).pow(2).mean() < (rounded - expected).pow(2).mean()
    else:
        assert (y - expected).abs().max() < 1e-6 * k
    for m in (1, 2, 3, 5, 6, 7, 16, 17, 32, 100, 130):
        assert torch.equal(linear(x[-m:], packed, threads=1 + m % 2), y[-m:]), m


def test_halves_take_any_magnitude():
    """Rows and weights of any size, rows of zeros, one large value among small ones; nothing overflows."""
    torch.manual_seed(0)
    x, w = torch.randn(9, 300), torch.randn(40, 300).bfloat16()
    plain = linear(x, PackedLinear(w, dtype=torch.bfloat16))
    for i, size in enumerate((1e-30, 1e-9, 1e4, 1e9, 1e30)):
        by = 2.0 ** round(np.log2(size))
        y = linear(x * by, PackedLinear(w / by, dtype=torch.bfloat16))
        assert torch.equal(y, plain), size
        x[i] = 0
        plain = linear(x, PackedLinear(w, dtype=torch.bfloat16))
        assert (plain[i] == 0).all()
    x[8, 5] = 1e5
    same = torch.full((32, 300), 7.0)
    for rows, weight in ((x, w), (same, torch.ones(40, 300).bfloat16())):
        y, expected = linear(rows, PackedLinear(weight, dtype=torch.bfloat16)), rows.double() @ weight.double().T
        assert (y - expected).abs().max() < 4e-3 * expected.abs().max()


def test_gated_linear():
    torch.manual_seed(0)
    x, w, bias = torch.randn(9, 40) * 5, torch.randn(2 * 37, 40), torch.randn(2 * 37)
    gate, up = (x.double() @ w.double().T + bias).chunk(2, -1)
    y = linear(x, PackedLinear(w, bias, gated=True))
    assert torch.allclose(y.double(), torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-4)
    assert torch.equal(linear(x[4:5], PackedLinear(w, bias, gated=True)), y[4:5])


def test_argmax_takes_the_lowest_of_equals():
    x = torch.randn(20, 67).round(decimals=0)
    x[3, 5:], x[4] = -torch.inf, -torch.inf
    expected = [row.tolist().index(row.max().item()) for row in x]
    assert argmax(x).tolist() == expected


def test_packed_and_adapted_models():
    net = model("llama-biases-untied")
    expected = scenario(NativeForward(net), pool_for(net))
    assert all(map(torch.equal, scenario(NativeForward(net.pack()), pool_for(net)), expected))
    moe = model("qwen3_moe")
    expected = scenario(NativeForward(moe), pool_for(moe))
    assert all(map(torch.equal, scenario(NativeForward(moe.pack()), pool_for(moe)), expected))
    net = model()
    names = add_lora(net, rank=2, alpha=4.0)
    for name in names:
        torch.nn.init.normal_(net.get_submodule(name).lora_B.weight)
    got = scenario(NativeForward(net), pool_for(net))
    expected = scenario(NativeForward(merge_lora(net)), pool_for(net))
    for x, y in zip(got, expected, strict=True):
        assert (x - y).abs().max() < 1e-4


def test_positions_grow_and_end():
    net = model()
    run, far = NativeForward(net), rows(ids(1), np.zeros(1, np.int32), positions=[5000])
    assert run.forward(pool_for(net), batch(far)).logits.isfinite().all()
    short = model(**LLAMA, rope_scaling={"type": "dynamic", "factor": 2.0})
    with pytest.raises(UnsupportedError, match="position 5000"):
        NativeForward(short).forward(pool_for(short), batch(far))


def test_a_wrong_batch_is_refused():
    net = model()
    run, good = NativeForward(net), batch(rows(ids(3), np.arange(3, dtype=np.int32)))
    with pytest.raises(PromptError, match=r"0\.\.63"):
        run.forward(pool_for(net), replace(good, tokens=np.array([0, 64, 1])))
    bad = np.array([0, 600, 1], np.int32)
    for field in ("slots", "context_of", "logit_rows", "positions"):
        with pytest.raises(IndexError):
            run.forward(pool_for(net), replace(good, **{field: -bad}))
    with pytest.raises(IndexError):
        run.forward(pool_for(net), replace(good, local=good.local + 3))
    with pytest.raises(UnsupportedError):
        run.forward(KVPool(1, 8, 2, 8), good)
    with pytest.raises(OptionError):
        NativeForward(net, "float16")


def test_says_why_it_is_off(monkeypatch, tmp_path):
    config = tiny.config()
    monkeypatch.setenv("STRETTO_NATIVE", "0")
    assert "STRETTO_NATIVE" in NativeForward.supported(config)
    monkeypatch.delenv("STRETTO_NATIVE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        for compiler, words in (("no-such-compiler", "no C compiler"), ("false", "'false' failed")):
            native_linear.library.cache_clear()
            monkeypatch.setenv("CC", compiler)
            assert words in NativeForward.supported(config)
    finally:
        monkeypatch.undo()
        native_linear.library.cache_clear()
    assert NativeForward.supported(config) is None


def test_one_openmp_runtime():
    NativeForward(model(), threads=2)
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc/self/maps")
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}
    assert len(loaded) <= 1, loaded


def test_a_forward_says_how_sure_its_best_tokens_are():
    net = model()
    run, pool, slots = NativeForward(net), pool_for(net), np.arange(512, dtype=np.int32)
    asked = run.forward(pool, batch(rows(ids(11), slots[:11]), sure=True), known=tiny.V - 3)
    assert run.forward(pool, batch(rows(ids(11), slots[:11]))).sure is None
    want = torch.softmax(asked.logits, -1).amax(-1)
    assert torch.allclose(torch.from_numpy(asked.sure), want, rtol=1e-5)
    rest = Outcome(asked.logits, asked.argmax, 4, 9, {}, slice(4, 9))  # of a forward that does not say it
    assert np.allclose(rest.sure, want[4:9], rtol=1e-5)
    assert np.array_equal(Outcome(asked.logits, asked.argmax, 4, 9, {}, slice(4, 9), asked.sure).sure, asked.sure[4:9])
