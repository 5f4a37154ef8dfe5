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
}
_EXPERT = {"mixtral": ("w1", "w3", "w2"), "experts": ("gate_proj", "up_proj", "down_proj")}
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")


@dataclass(frozen=True)
class Piece:
    """The disk tensor ``name`` fills ``parameter[index]``."""

    name: str
    index: Index = ()


def _rename(name: str, table: str) -> str:
    for here, there in _TABLES[table]:
        name = name.replace(here, there, 1)
    return name


def pieces(parameter: str, config: ModelConfig) -> Iterator[Piece]:
    """The disk tensors of one parameter, in the order of its rows."""
    table = config.family.names
    if ".experts." not in parameter:
        yield Piece(_rename(parameter, table))
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


def ignorable(name: str, config: ModelConfig) -> bool:
    """A disk tensor that carries nothing: old rotary buffers, and the head of a tied model."""
    tied_head = config.tie_word_embeddings and name == _rename(
        "lm_head.weight", config.family.names
    )
    return tied_head or bool(_IGNORED.search(name))
