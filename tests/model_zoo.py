"""Tiny random checkpoints of every family that transformers has, made to show errors: no tensor is
trivial.
"""

from __future__ import annotations

import torch
import transformers

BASE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
}


def rope(kind: str, **params) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **params}}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
YARN_MSCALE = rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    mscale=0.7,
    mscale_all_dim=0.4,
    beta_fast=16,
    beta_slow=2,
    truncate=False,
)
LONG_FACTORS = dict(short_factor=[1.0, 1.1, 1.3, 1.5], long_factor=[2.0, 3.0, 4.0, 5.0])
LONG = rope("longrope", **LONG_FACTORS, original_max_position_embeddings=32, factor=2.0)
LONGER = rope("longrope", **LONG_FACTORS, original_max_position_embeddings=8, factor=8.0)

CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-1kv": ("llama", dict(num_key_value_heads=1)),
    "llama-all-kv": ("llama", dict(num_key_value_heads=4)),
    "llama-head-dim": ("llama", dict(head_dim=12)),
    "llama-theta": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-3},
    ),
    "llama-linear": ("llama", rope("linear", factor=4.0)),
    "llama-dynamic": ("llama", rope("dynamic", factor=4.0) | {"max_position_embeddings": 8}),
    "llama-llama3": ("llama", LLAMA3),
    "llama-yarn": ("llama", YARN),
    "llama-yarn-mscale": ("llama", YARN_MSCALE),
    "llama-longrope-short": ("llama", LONG),
    "llama-longrope-long": ("llama", LONGER),
    "mistral-window": ("mistral", dict(sliding_window=5)),
    "mistral-no-window": ("mistral", dict(sliding_window=None)),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-1kv": ("qwen2", dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "qwen3-tied-bias": ("qwen3", dict(head_dim=8, tie_word_embeddings=True, attention_bias=True)),
    "qwen3-window": (
        "qwen3",
        dict(
            head_dim=8,
            use_sliding_window=True,
            sliding_window=3,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "mixtral-window": (
        "mixtral",
        dict(num_local_experts=3, num_experts_per_tok=1, sliding_window=4),
    ),
    "qwen3_moe": (
        "qwen3_moe",
        dict(
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            head_dim=8,
            norm_topk_prob=True,
        ),
    ),
    "qwen3_moe-raw-weights": (
        "qwen3_moe",
        dict(
            num_experts=4,
            num_experts_per_tok=3,
            moe_intermediate_size=16,
            head_dim=8,
            norm_topk_prob=False,
        ),
    ),
    "qwen3_moe-dense-layer": (
        "qwen3_moe",
        dict(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            head_dim=8,
            norm_topk_prob=True,
            mlp_only_layers=[0],
        ),
    ),
}


def reference(family: str, **changes) -> torch.nn.Module:
    """A transformers model in float32 with matrices x 4, and every norm and bias off its initial
    value.
    """
    torch.manual_seed(0)
    config = getattr(transformers, CLASSES[family] + "Config")(**(BASE | changes))
    config._attn_implementation = "sdpa"
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    model = getattr(transformers, CLASSES[family] + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
            else:
                p.add_(0.3 * torch.randn_like(p))
    return model


def ids(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, BASE["vocab_size"], (n,), generator=torch.Generator().manual_seed(seed))
