"""The model families: one row of facts each. A new family of this architecture is a new row, not a
new class.

Sources: the published config and model files of each family (Apache-2.0 or MIT); see ``docs`` for
the list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stretto.errors import ArchitectureError

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """Facts that a family fixes. A ``bool | str`` flag is either fixed or the name of the config
    key that holds it.

    ``keys``: canonical name -> the family's own keys, first choice first. ``defaults``: values
    where config.json has none. ``fixed``: keys that, where given, must have this value. ``window``:
    "always" (mistral: all layers, 4096 if absent), "layers" (qwen: only with use_sliding_window) or
    None. ``moe``: "mixtral", "qwen", "bailing" or None. ``names``: table of tensor names in ``checkpoint``.
    ``rope_style``: does a fresh config.json hold ``rope_parameters`` ("new") or ``rope_theta``
    ("old").
    """

    architecture: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool | str = False
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    window: str | None = None
    moe: str | None = None
    attention: str = "causal"
    block_size: int = 1
    shift: bool = False
    rope_fp32: bool = False
    rope_partial: bool = False  # may config.json rotate a part of each head (partial_rotary_factor)
    rope_style: str = "new"
    names: str = "hf"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    model_type: str | None = None  # where it differs from the key of the table


_QWEN2 = Family("Qwen2ForCausalLM", qkv_bias=True, window="layers")
_QWEN3 = Family(
    "Qwen3ForCausalLM",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    qk_norm=True,
    window="layers",
    defaults={"head_dim": 128},
)
_EXPERTS = {"num_experts": ("num_experts", "num_local_experts")}
_QWEN3_MOE = replace(
    _QWEN3,
    architecture="Qwen3MoeForCausalLM",
    moe="qwen",
    names="experts",
    keys=_EXPERTS,
    defaults={},
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": Family("MistralForCausalLM", window="always"),
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "mixtral": Family(
        "MixtralForCausalLM",
        moe="mixtral",
        names="mixtral",
        window="always",
        keys={
            "num_experts": ("num_local_experts",),
            "moe_intermediate_size": ("intermediate_size",),
        },
        defaults={
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
        },
    ),
    "qwen3_moe": _QWEN3_MOE,
    "llada": Family(
        "LLaDAModelLM",
        qkv_bias="include_qkv_bias",
        attention="full",
        rope_fp32=True,
        names="llada",
        rope_style="old",
        keys={
            "hidden_size": ("d_model",),
            "intermediate_size": ("mlp_hidden_size",),
            "num_hidden_layers": ("n_layers",),
            "num_attention_heads": ("n_heads",),
            "num_key_value_heads": ("n_kv_heads",),
            "max_position_embeddings": ("max_sequence_length",),
            "tie_word_embeddings": ("weight_tying",),
            "hidden_act": ("activation_type",),
            "vocab_size": ("embedding_size", "vocab_size"),
        },
        defaults={
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "mask_token_id": None,
        },
        fixed={
            "include_bias": False,
            "attention_layer_norm": False,
            "scale_logits": False,
            "alibi": False,
            "rope": True,
            "layer_norm_type": "rms",
            "block_type": "llama",
        },
    ),
    "Dream": replace(_QWEN2, architecture="DreamModel", attention="full", shift=True),
    "sdar": replace(_QWEN3, architecture="SDARForCausalLM", attention="block", block_size=4),
    "sdar_moe": replace(
        _QWEN3_MOE, architecture="SDARMoeForCausalLM", attention="block", block_size=4
    ),
    "wedlm": Family(
        "WeDLMForCausalLM", qkv_bias="attention_bias", qk_norm="qk_norm", window="layers"
    ),
    "Fast_dLLM_Qwen": replace(
        _QWEN2,
        architecture="Fast_dLLM_QwenForCausalLM",
        attention="block",
        block_size=32,
        shift=True,
    ),
    "llada_moe": Family(
        "LLaDAMoEModelLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="qk_layernorm",
        attention="full",
        moe="qwen",
        names="experts",
        keys={
            **_EXPERTS,
            "moe_intermediate_size": ("expert_intermediate_size", "moe_intermediate_size"),
            "intermediate_size": ("dense_intermediate_size", "intermediate_size"),
        },
        rope_style="old",
        model_type="llada",
    ),
}


FAMILIES["llada2_moe"] = Family(
    "LLaDA2MoeModelLM",
    qkv_bias="use_qkv_bias",
    o_bias="use_bias",
    mlp_bias="use_bias",
    qk_norm="use_qk_norm",
    attention="block",
    block_size=32,
    rope_partial=True,
    moe="bailing",
    names="bailing",
    rope_style="old",
    keys={
        "num_experts": ("num_experts",),
        "score": ("score_function",),
        "expert_bias": ("moe_router_enable_expert_bias",),
        "shared_size": ("moe_shared_expert_intermediate_size",),
    },
    defaults={
        "score": "sigmoid",
        "expert_bias": True,
        "norm_topk_prob": True,
        "use_qk_norm": True,
    },
)


def family_of(data: Mapping[str, Any]) -> tuple[str, Family]:
    """The name and row of the family of a config.json; ArchitectureError lists the supported
    ones.
    """
    kind = data.get("model_type")
    if kind in ("llada", "lladamoe") and "num_experts" in data:
        kind = "llada_moe"
    if kind not in FAMILIES:
        raise ArchitectureError(
            f"model_type {kind!r} is not supported: supported are {', '.join(sorted(FAMILIES))}"
        )
    return kind, FAMILIES[kind]
