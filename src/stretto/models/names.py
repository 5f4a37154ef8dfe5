"""Which tensors on disk make up which parameter in memory, both ways, for every family.

A table is a list of (name in memory, name on disk) fragments, replaced in order. Experts are fused
in memory and apart on disk: a *piece* is a disk tensor and the place inside the parameter where it
lies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from stretto.models.config import ModelConfig

__all__ = ["Piece", "ignorable", "pieces"]

Index = tuple[int | slice, ...]

_LLADA = (
    ("model.embed_tokens.", "model.transformer.wte."),
    ("model.norm.", "model.transformer.ln_f."),
    ("lm_head.", "model.transformer.ff_out."),
    ("model.layers.", "model.transformer.blocks."),
    (".self_attn.o_proj.", ".attn_out."),
    (".self_attn.", "."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ff_norm."),
    (".mlp.gate_proj.", ".ff_proj."),
    (".mlp.up_proj.", ".up_proj."),
    (".mlp.down_proj.", ".ff_out."),
)
_TABLES: dict[str, tuple[tuple[str, str], ...]] = {
    "hf": (),
    "experts": (),
    "mixtral": (
        (".mlp.gate.", ".block_sparse_moe.gate."),
        (".mlp.experts.", ".block_sparse_moe.experts."),
    ),
    "llada": _LLADA,
    "bailing": (
        ("model.embed_tokens.", "model.word_embeddings."),
        (".self_attn.o_proj.", ".attention.dense."),
        (".self_attn.q_norm.", ".attention.query_layernorm."),
        (".self_attn.k_norm.", ".attention.key_layernorm."),
        (".self_attn.", ".attention."),
    ),
}
_PLAIN = ("gate_proj", "up_proj", "down_proj")
_EXPERT = {"mixtral": ("w1", "w3", "w2"), "experts": _PLAIN, "bailing": _PLAIN}
_FUSED = {"bailing": "query_key_value"}  # the rows of q, then k, then v, in one tensor
_QKV = re.compile(r"\.([qkv])_proj\.")
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")


@dataclass(frozen=True)
class Piece:
    """The disk tensor ``name`` fills ``parameter[index]``.

    Where several parameters share a disk tensor, ``part`` are the rows of it that belong here, of
    ``whole`` rows.
    """

    name: str
    index: Index = ()
    part: slice | None = None
    whole: int = 0


def _rename(name: str, table: str) -> str:
    for here, there in _TABLES[table]:
        name = name.replace(here, there, 1)
    return name


def pieces(parameter: str, config: ModelConfig) -> Iterator[Piece]:
    """The disk tensors of one parameter, in the order of its rows."""
    table = config.family.names
    if ".experts." not in parameter:
        yield _plain(parameter, table, config)
        return
    prefix, _, kind = _rename(parameter, table).rpartition(".")
    gate, up, down = _EXPERT[table]
    size = config.moe.intermediate_size
    for e in range(config.moe.experts):
        if kind == "down_proj":
            yield Piece(f"{prefix}.{e}.{down}.weight", (e,))
        else:
            yield Piece(f"{prefix}.{e}.{gate}.weight", (e, slice(0, size)))
            yield Piece(f"{prefix}.{e}.{up}.weight", (e, slice(size, 2 * size)))


def _plain(parameter: str, table: str, config: ModelConfig) -> Piece:
    """The one disk tensor of a parameter, or its rows of a fused one."""
    name = _rename(parameter, table)
    found = _QKV.search(parameter)
    if found is None or table not in _FUSED:
        return Piece(name)
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    starts = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
    fused = name.replace(found.group(), f".{_FUSED[table]}.", 1)
    return Piece(fused, part=slice(*starts[found.group(1)]), whole=q + 2 * kv)


def ignorable(name: str, config: ModelConfig) -> bool:
    """A disk tensor that carries nothing: old rotary buffers, and the head of a tied model."""
    tied_head = config.tie_word_embeddings and name == _rename(
        "lm_head.weight", config.family.names
    )
    return tied_head or bool(_IGNORED.search(name))
