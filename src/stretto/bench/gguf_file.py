"""A Qwen3 checkpoint as a GGUF file (version 3) that llama.cpp reads: bf16 matrices, float32 norms, no tokenizer.

Format: ggml's docs/gguf.md. Only what ``bench --peers`` needs; ids go in and come out as numbers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["write_gguf"]

ALIGNMENT = 32
F32, BF16 = 0, 30  # ggml types
U32, FLOAT, STRING = 4, 6, 8  # metadata value types
NAMES = {  # Hugging Face -> GGUF
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, file: Path) -> None:
    """Write the weights of the Qwen3 checkpoint in ``folder`` to ``file``."""
    config = json.loads((folder / "config.json").read_text())
    tensors = list(_tensors(folder))
    with file.open("wb") as out:
        facts = _facts(config)
        out.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts)))
        for key, value in facts.items():
            _text(out, key)
            _value(out, value)
        offset = 0
        for name, tensor in tensors:
            _text(out, name)
            out.write(struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *reversed(tensor.shape)))
            out.write(struct.pack("<IQ", F32 if tensor.ndim == 1 else BF16, offset))
            offset += _padded(_bytes(tensor))
        out.write(b"\0" * (-out.tell() % ALIGNMENT))
        for _, tensor in tensors:
            data = _raw(tensor)
            out.write(data + b"\0" * (_padded(len(data)) - len(data)))


def _facts(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    facts = {
        "context_length": config["max_position_embeddings"], "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"], "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config.get("rope_theta") or rope["rope_theta"]), "vocab_size": config["vocab_size"],
    }
    return {
        "general.architecture": "qwen3", "general.name": "random",
        **{f"qwen3.{key}": value for key, value in facts.items()}, "tokenizer.ggml.model": "none",
    }


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors.torch import load_file

    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            stem = name.removesuffix(".weight")
            if stem.startswith("model.layers."):
                _, _, layer, part = stem.split(".", 3)
                yield f"blk.{layer}.{NAMES[part]}.weight", tensor
            else:
                yield f"{NAMES[stem]}.weight", tensor


def _raw(tensor: Any) -> bytes:
    import torch

    if tensor.ndim == 1:
        return tensor.float().numpy().tobytes()
    return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()


def _bytes(tensor: Any) -> int:
    return tensor.numel() * (4 if tensor.ndim == 1 else 2)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(out: BinaryIO, text: str) -> None:
    data = text.encode()
    out.write(struct.pack("<Q", len(data)) + data)


def _value(out: BinaryIO, value: Any) -> None:
    if isinstance(value, str):
        out.write(struct.pack("<I", STRING))
        _text(out, value)
    elif isinstance(value, float):
        out.write(struct.pack("<If", FLOAT, value))
    else:
        out.write(struct.pack("<II", U32, value))
