"""A Qwen3 checkpoint as a GGUF file (version 3) that llama.cpp reads: bf16 matrices, float32 norms, its tokenizer.

Format: ggml's docs/gguf.md. Only what ``bench --peers`` and ``bench --servers`` need: the tokenizer is written as one
of the zoo's form, byte-level BPE with GPT-2's pieces and digits by themselves ("smollm" in llama.cpp).
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
U32, I32, FLOAT, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # metadata value types
NORMAL, CONTROL, UNUSED = 1, 3, 5  # types of tokens
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
        facts = _facts(config) | _tokenizer(folder, config["vocab_size"])
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
        **{f"qwen3.{key}": value for key, value in facts.items()},
    }


def _tokenizer(folder: Path, rows: int) -> dict[str, Any]:
    """Tokens, their types and merges, for ``rows`` ids: those without a token are unused."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return {"tokenizer.ggml.model": "none"}
    found = json.loads(file.read_text(encoding="utf-8"))
    names = [f"<|unused_{i}|>" for i in range(rows)]
    types = [UNUSED] * rows
    for text, i in found["model"]["vocab"].items():
        names[i], types[i] = text, NORMAL
    for token in found["added_tokens"]:
        names[token["id"]], types[token["id"]] = token["content"], CONTROL
    merges = [m if isinstance(m, str) else " ".join(m) for m in found["model"]["merges"]]
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    facts = {
        "model": "gpt2", "pre": "smollm", "tokens": names, "token_type": types, "merges": merges,
        "add_bos_token": False,
    }
    for key, name in (("eos_token_id", "eos_token"), ("padding_token_id", "pad_token"), ("bos_token_id", "bos_token")):
        if settings.get(name) in names:
            facts[key] = names.index(settings[name])
    template = folder / "chat_template.jinja"
    chat = {"tokenizer.chat_template": template.read_text(encoding="utf-8")} if template.exists() else {}
    return {f"tokenizer.ggml.{key}": value for key, value in facts.items()} | chat


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
    if isinstance(value, list):
        out.write(struct.pack("<IIQ", ARRAY, I32 if isinstance(value[0], int) else STRING, len(value)))
        for one in value:
            out.write(struct.pack("<i", one)) if isinstance(one, int) else _text(out, one)
    elif isinstance(value, bool):
        out.write(struct.pack("<I?", BOOL, value))
    elif isinstance(value, str):
        out.write(struct.pack("<I", STRING))
        _text(out, value)
    elif isinstance(value, float):
        out.write(struct.pack("<If", FLOAT, value))
    else:
        out.write(struct.pack("<II", U32, value))
