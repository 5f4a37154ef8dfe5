"""LLaDA2 (``llada2_moe``) against a slow reference written from its published model file."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from model_zoo import ids
from stretto.engine.runner import Runner
from stretto.errors import ArchitectureError, UnsupportedError
from stretto.models.checkpoint import load, load_config
from stretto.models.context import plain_logits
from stretto.models.native import NativeForward

H, A, G, D, R, I, L, V, E, K, W, B = 32, 4, 2, 12, 6, 40, 3, 61, 8, 3, 20, 4
GROUPS, TOP_GROUPS, SCALE, EPS, THETA = 4, 2, 2.5, 1e-6, 6e5
CONFIG = dict(
    model_type="llada2_moe", architectures=["LLaDA2MoeModelLM"], hidden_size=H, num_attention_heads=A,
    num_key_value_heads=G, num_hidden_layers=L, head_dim=D, intermediate_size=I, moe_intermediate_size=W,
    num_experts=E, num_experts_per_tok=K, num_shared_experts=1, n_group=GROUPS, topk_group=TOP_GROUPS,
    norm_topk_prob=True, routed_scaling_factor=SCALE, score_function="sigmoid", moe_router_enable_expert_bias=True,
    first_k_dense_replace=1, partial_rotary_factor=0.5, use_qk_norm=True, use_qkv_bias=False, use_bias=False,
    rope_theta=THETA, rope_scaling=None, vocab_size=V, rms_norm_eps=EPS, max_position_embeddings=64,
    tie_word_embeddings=False, hidden_act="silu", block_size=B, mask_token_id=60, eos_token_id=59, pad_token_id=59,
)  # fmt: skip


def write(path, **changes):
    """A random checkpoint in the published layout: fused qkv, biases of the experts, one shared expert."""
    torch.manual_seed(2)
    tensors = {}

    def add(name, *shape):
        scale = 0.4 if len(shape) > 1 else 0.3
        tensors[name] = torch.randn(shape) * scale + float("norm" in name)

    def add_mlp(prefix, width):
        add(f"{prefix}.gate_proj.weight", width, H)
        add(f"{prefix}.up_proj.weight", width, H)
        add(f"{prefix}.down_proj.weight", H, width)

    add("model.word_embeddings.weight", V, H)
    add("model.norm.weight", H)
    add("lm_head.weight", V, H)
    for i in range(L):
        p = f"model.layers.{i}"
        add(f"{p}.attention.query_key_value.weight", (A + 2 * G) * D, H)
        add(f"{p}.attention.dense.weight", H, A * D)
        for norm, size in {
            "attention.query_layernorm": D, "attention.key_layernorm": D, "input_layernorm": H,
            "post_attention_layernorm": H,
        }.items():  # fmt: skip
            add(f"{p}.{norm}.weight", size)
        if i < CONFIG["first_k_dense_replace"]:
            add_mlp(f"{p}.mlp", I)
            continue
        add(f"{p}.mlp.gate.weight", E, H)
        add(f"{p}.mlp.gate.expert_bias", E)
        add_mlp(f"{p}.mlp.shared_experts", W)
        for e in range(E):
            add_mlp(f"{p}.mlp.experts.{e}", W)
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    return tensors


def rms(x, weight):
    return weight * (x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS))


def rotate(x):
    """x [D] at each position; the first R of its D dimensions turn, pair (i, i + R/2)."""
    out = x.clone()
    for position in range(len(x)):
        for i in range(R // 2):
            angle = position * THETA ** (-2 * i / R)
            a, b = x[position, i], x[position, i + R // 2]
            out[position, i] = a * math.cos(angle) - b * math.sin(angle)
            out[position, i + R // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def swiglu(h, t, p):
    g = t[p + ".gate_proj.weight"] @ h
    return t[p + ".down_proj.weight"] @ (g * torch.sigmoid(g) * (t[p + ".up_proj.weight"] @ h))


def experts(h, t, p):
    """Groups by the sum of their two best biased scores; experts by biased scores; weights by plain ones."""
    plain = torch.sigmoid(t[p + ".gate.weight"] @ h)
    biased = plain + t[p + ".gate.expert_bias"]
    size = E // GROUPS
    rank = sorted(range(GROUPS), key=lambda g: -sum(sorted(biased[g * size : (g + 1) * size].tolist())[-2:]))
    eligible = [e for g in rank[:TOP_GROUPS] for e in range(g * size, (g + 1) * size)]
    chosen = sorted(eligible, key=lambda e: -float(biased[e]))[:K]
    total = sum(plain[e] for e in chosen)
    routed = sum(plain[e] / total * SCALE * swiglu(h, t, f"{p}.experts.{e}") for e in chosen)
    return routed + swiglu(h, t, p + ".shared_experts")


def reference(tensors, tokens):
    """Logits in float64, every head and every row by itself."""
    t, length = {k: v.double() for k, v in tensors.items()}, len(tokens)
    x = t["model.word_embeddings.weight"][tokens]
    for layer in range(L):
        p = f"model.layers.{layer}"
        h = rms(x, t[p + ".input_layernorm.weight"])
        q, k, v = (h @ t[p + ".attention.query_key_value.weight"].T).split([A * D, G * D, G * D], -1)
        norms = {"q": t[p + ".attention.query_layernorm.weight"], "k": t[p + ".attention.key_layernorm.weight"]}
        heads = lambda y: y.view(length, -1, D).transpose(0, 1)
        q = [rotate(rms(y, norms["q"])) for y in heads(q)]
        k = [rotate(rms(y, norms["k"])) for y in heads(k)]
        out = torch.zeros(length, A, D, dtype=torch.float64)
        for a in range(A):
            keys, values = k[a // (A // G)], heads(v)[a // (A // G)]
            for i in range(length):
                js = [j for j in range(length) if j // B <= i // B]
                out[i, a] = torch.softmax(keys[js] @ q[a][i] / math.sqrt(D), 0) @ values[js]
        x = x + out.view(length, A * D) @ t[p + ".attention.dense.weight"].T
        h = rms(x, t[p + ".post_attention_layernorm.weight"])
        mlp = swiglu if layer < CONFIG["first_k_dense_replace"] else experts
        x = x + torch.stack([mlp(row, t, p + ".mlp") for row in h])
    return rms(x, t["model.norm.weight"]) @ t["lm_head.weight"].T


def test_logits(tmp_path):
    tensors, text = write(tmp_path / "model"), ids(13)
    got = plain_logits(load(tmp_path / "model", dtype="float32"), text)
    want = reference(tensors, text)
    assert want.std() > 0.1
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()  # float32 against float64


def test_round_trip(tmp_path):
    """Names, bytes and config as they were, in float32 and from bfloat16; a fresh config reads as the same model."""
    tensors = write(tmp_path / "model")
    for dtype in ("float32", "bfloat16"):
        model = load(tmp_path / "model", dtype=dtype)
        model.save(tmp_path / dtype)
        again = load_file(tmp_path / dtype / "model.safetensors")
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[k], tensors[k]) for k in tensors)
        assert json.loads((tmp_path / dtype / "config.json").read_text()) == CONFIG
    model.config = model.config.changed(source={}, dtype="bfloat16")
    model.save(tmp_path / "fresh", dtype="bfloat16")
    assert load_config(tmp_path / "fresh") == model.config


def test_what_a_decoder_needs(tmp_path):
    write(tmp_path / "model")
    c = load_config(tmp_path / "model")
    assert (c.attention, c.block_size, c.shift, c.mask_token_id, c.eos_token_ids) == ("block", B, False, 60, (59,))
    assert (c.rope.partial, c.moe.sparse, c.moe.shared) == (0.5, (False, True, True), W)


def test_the_native_forward_says_why_it_refuses(tmp_path):
    """... and the torch one decodes in its place."""
    write(tmp_path / "model")
    reason = NativeForward.supported(load_config(tmp_path / "model"))
    assert reason
    with pytest.raises(UnsupportedError, match="backend='native'"):
        Runner(load(tmp_path / "model", dtype="float32"), slots=64, backend="native")
    eng = tiny.engine(load(tmp_path / "model", dtype="float32"), slots=256, stop=(59,))
    assert eng.runner.backend == "torch" and eng.runner.backend_reason == reason
    (stream,) = tiny.run(eng, [([5, 9, 7, 11], tiny.greedy(9, ignore_eos=True), "diffusion", {})])[0]
    assert len(tiny.tokens(stream)) == 9


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"n_group": 3}, "n_group=3"), ({"topk_group": 5}, "topk_group=5"), ({"score_function": "tanh"}, "tanh"),
     ({"num_experts_per_tok": 5}, "topk_group"), ({"partial_rotary_factor": 0.25}, "even")],
)  # fmt: skip
def test_refusals(tmp_path, changes, match):
    write(tmp_path / "model", **changes)
    with pytest.raises(ArchitectureError, match=match):
        load_config(tmp_path / "model")
