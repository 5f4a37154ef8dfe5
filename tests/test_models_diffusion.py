"""LLaDA, Dream, SDAR, Fast-dLLM v2, WeDLM and LLaDA-MoE against a slow reference written from their
published model files. LLaDA2 has a file of its own.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_zoo import ids
from stretto.errors import ArchitectureError
from stretto.models.checkpoint import load, load_config
from stretto.models.context import plain_logits

H, A, G, D, I, L, V, E, K = 32, 4, 2, 8, 40, 2, 61, 6, 2
N = 13

CONFIGS = {
    "llada": dict(
        model_type="llada",
        d_model=H,
        n_heads=A,
        n_kv_heads=G,
        n_layers=L,
        mlp_hidden_size=I,
        rope_theta=5e5,
        max_sequence_length=64,
        embedding_size=V,
        vocab_size=V,
        weight_tying=False,
        include_bias=False,
        include_qkv_bias=False,
        rms_norm_eps=1e-5,
        activation_type="silu",
        mask_token_id=60,
        eos_token_id=59,
        pad_token_id=59,
        rope=True,
        rope_full_precision=True,
        block_type="llama",
        layer_norm_type="rms",
        attention_layer_norm=False,
        scale_logits=False,
        alibi=False,
    ),
    "dream": dict(
        model_type="Dream",
        hidden_size=H,
        num_attention_heads=A,
        num_key_value_heads=G,
        num_hidden_layers=L,
        intermediate_size=I,
        rope_theta=1e6,
        rope_scaling=None,
        vocab_size=V,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        mask_token_id=60,
        eos_token_id=59,
        pad_token_id=59,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=28,
    ),
    "sdar": dict(
        model_type="sdar",
        hidden_size=H,
        num_attention_heads=A,
        num_key_value_heads=G,
        num_hidden_layers=L,
        intermediate_size=I,
        head_dim=D,
        rope_theta=1e6,
        vocab_size=V,
        rms_norm_eps=1e-6,
        block_size=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        mask_token_id=60,
        eos_token_id=59,
    ),
    "fast_dllm": dict(
        model_type="Fast_dLLM_Qwen",
        architectures=["Fast_dLLM_QwenForCausalLM"],
        hidden_size=H,
        num_attention_heads=A,
        num_key_value_heads=G,
        num_hidden_layers=L,
        intermediate_size=I,
        rope_theta=1e6,
        vocab_size=V,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        use_sliding_window=False,
        mask_token_id=60,
        eos_token_id=59,
    ),
    "wedlm": dict(
        model_type="wedlm",
        architectures=["WeDLMForCausalLM"],
        hidden_size=H,
        num_attention_heads=A,
        num_key_value_heads=G,
        num_hidden_layers=L,
        intermediate_size=I,
        head_dim=D,
        rope_theta=1e6,
        vocab_size=V,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attention_bias=True,
        qk_norm=True,
        mask_token_id=60,
        eos_token_id=59,
    ),
    "llada_moe": dict(
        model_type="llada",
        architectures=["LLaDAMoEModelLM"],
        hidden_size=H,
        num_attention_heads=A,
        num_key_value_heads=G,
        num_hidden_layers=L,
        dense_intermediate_size=I,
        expert_intermediate_size=24,
        num_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=None,
        moe_layer_freq=[1, 1],
        qk_layernorm=True,
        rope_theta=5e4,
        vocab_size=V,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        hidden_act="silu",
        attention_bias=False,
        tie_word_embeddings=False,
        mask_token_id=60,
        eos_token_id=59,
    ),
}
BIASED, NORMED = ("dream", "fast_dllm", "wedlm"), ("sdar", "wedlm", "llada_moe")
BLOCKS = {"sdar": 4, "fast_dllm": 32, "wedlm": 1}  # rows that see each other; the others all do
RENAMED = {
    "embed": "model.transformer.wte",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "layer": "model.transformer.blocks.{}.",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "n1": "attn_norm",
    "n2": "ff_norm",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}
NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{}.",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "n1": "input_layernorm",
    "n2": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
EXPERT = "mlp.experts.{}.{}_proj"


def names(kind):
    return RENAMED if kind == "llada" else NAMES


def write(path, kind, **changes):
    """A random checkpoint in the family's own layout."""
    torch.manual_seed(1)
    n, tensors = names(kind), {}

    def add(name, *shape, what="weight"):
        scale = 0.4 if len(shape) > 1 else 0.3
        tensors[f"{name}.{what}"] = torch.randn(shape) * scale + (
            what == "weight" and len(shape) == 1
        )

    add(n["embed"], V, H)
    add(n["norm"], H)
    add(n["head"], V, H)
    for i in range(L):
        p = n["layer"].format(i)
        for part, shape in {
            "q": (A * D, H),
            "k": (G * D, H),
            "v": (G * D, H),
            "o": (H, A * D),
        }.items():
            add(p + n[part], *shape)
            if kind in BIASED and part != "o":
                add(p + n[part], shape[0], what="bias")
        add(p + n["n1"], H)
        add(p + n["n2"], H)
        if kind in NORMED:
            add(p + "self_attn.q_norm", D)
            add(p + "self_attn.k_norm", D)
        if kind == "llada_moe":
            add(p + "mlp.gate", E, H)
            for e in range(E):
                for part, shape in {"gate": (24, H), "up": (24, H), "down": (H, 24)}.items():
                    add(p + EXPERT.format(e, part), *shape)
        else:
            for part, shape in {"gate": (I, H), "up": (I, H), "down": (H, I)}.items():
                add(p + n[part], *shape)
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIGS[kind] | changes))
    return tensors


def rms(x, weight, eps):
    return weight * (x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps))


def rotate(x, theta):
    """x [D] at each position, pair (i, i + D/2) by the angle position * theta^(-2i/D); loops on
    purpose.
    """
    out = torch.empty_like(x)
    for position in range(len(x)):
        for i in range(D // 2):
            angle = position * theta ** (-2 * i / D)
            a, b = x[position, i], x[position, i + D // 2]
            out[position, i] = a * math.cos(angle) - b * math.sin(angle)
            out[position, i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def reference(kind, tensors, tokens):
    """Logits in float64, every head and every row by itself."""
    block = BLOCKS.get(kind, len(tokens))
    t, n, c = {k: v.double() for k, v in tensors.items()}, names(kind), CONFIGS[kind]
    eps, theta, length = c["rms_norm_eps"], c["rope_theta"], len(tokens)
    sees = [[j for j in range(length) if j // block <= i // block] for i in range(length)]
    x = t[n["embed"] + ".weight"][tokens]
    for layer in range(L):
        p = n["layer"].format(layer)
        h = rms(x, t[p + n["n1"] + ".weight"], eps)
        parts = {}
        for part in "qkv":
            y = h @ t[p + n[part] + ".weight"].T + t.get(p + n[part] + ".bias", 0)
            heads = y.view(length, -1, D).transpose(0, 1)
            norm = t.get(f"{p}self_attn.{part}_norm.weight")
            heads = heads if norm is None else rms(heads, norm, eps)
            parts[part] = heads if part == "v" else torch.stack([rotate(z, theta) for z in heads])
        out = torch.zeros(length, A, D, dtype=torch.float64)
        for a in range(A):
            q, k, v = parts["q"][a], parts["k"][a // (A // G)], parts["v"][a // (A // G)]
            for i, js in enumerate(sees):
                out[i, a] = torch.softmax(k[js] @ q[i] / math.sqrt(D), 0) @ v[js]
        x = x + out.view(length, A * D) @ t[p + n["o"] + ".weight"].T
        h = rms(x, t[p + n["n2"] + ".weight"], eps)
        x = x + (experts if kind == "llada_moe" else dense)(t, p, n, h)
    return rms(x, t[n["norm"] + ".weight"], eps) @ t[n["head"] + ".weight"].T


def swiglu(h, gate, up, down):
    g = h @ gate.T
    return (g * torch.sigmoid(g) * (h @ up.T)) @ down.T


def dense(t, p, n, h):
    return swiglu(h, *(t[p + n[part] + ".weight"] for part in ("gate", "up", "down")))


def experts(t, p, n, h):
    """Softmax over all experts, the largest K of them, weights as they are."""
    out = torch.zeros_like(h)
    for i, row in enumerate(h):
        weights = torch.softmax(t[p + "mlp.gate.weight"] @ row, 0)
        for e in weights.argsort(descending=True)[:K].tolist():
            mats = (t[p + EXPERT.format(e, part) + ".weight"] for part in ("gate", "up", "down"))
            out[i] += weights[e] * swiglu(row, *mats)
    return out


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


def test_logits(tmp_path, kind):
    tensors = write(tmp_path / "model", kind)
    text = ids(N if kind != "fast_dllm" else 40)  # two blocks
    got = plain_logits(load(tmp_path / "model", dtype="float32"), text)
    want = reference(kind, tensors, text)
    assert want.std() > 0.1
    assert (got - want).abs().max() <= 5e-6 * want.abs().max()  # float32 against float64


def test_round_trip(tmp_path, kind):
    """Names, bytes and config as they were; and a fresh config reads as the same model."""
    tensors = write(tmp_path / "model", kind)
    model = load(tmp_path / "model", dtype="float32")
    model.save(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], tensors[k]) for k in tensors)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == CONFIGS[kind]
    model.config = model.config.changed(source={}, dtype="float32")
    model.save(tmp_path / "fresh")
    assert load_config(tmp_path / "fresh") == model.config


@pytest.mark.parametrize(
    ("kind", "attention", "block", "shift"),
    [
        ("llada", "full", 1, False),
        ("dream", "full", 1, True),
        ("sdar", "block", 4, False),
        ("fast_dllm", "block", 32, True),
        ("wedlm", "causal", 1, False),
        ("llada_moe", "full", 1, False),
    ],
)
def test_what_a_decoder_needs(tmp_path, kind, attention, block, shift):
    write(tmp_path / "model", kind)
    c = load_config(tmp_path / "model")
    assert (c.attention, c.block_size, c.shift) == (attention, block, shift)
    assert (c.mask_token_id, c.eos_token_ids, c.vocab_size) == (60, (59,), V)


def test_llada_facts(tmp_path):
    """Tied unless it says otherwise; embedding rows, not vocabulary; fused-width rules;
    refusals.
    """
    write(tmp_path / "model", "llada", weight_tying=None, n_kv_heads=None, vocab_size=50)
    c = load_config(tmp_path / "model")
    assert (c.tie_word_embeddings, c.num_key_value_heads, c.vocab_size) == (True, A, V)
    write(tmp_path / "ratio", "llada", mlp_hidden_size=None, mlp_ratio=4)
    assert load_config(tmp_path / "ratio").intermediate_size == 4 * H
    for i, changes in enumerate(
        (dict(alibi=True), dict(attention_layer_norm=True), dict(layer_norm_type="low_precision"))
    ):
        write(tmp_path / str(i), "llada", **changes)
        with pytest.raises(ArchitectureError, match=next(iter(changes))):
            load(tmp_path / str(i))


def test_llada_rotates_in_float32(tmp_path):
    """In bfloat16 the angles of far positions would be lost."""
    write(tmp_path / "model", "llada")
    rotary = load(tmp_path / "model", dtype="bfloat16").rotary
    cos, sin = rotary(torch.arange(N), torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
