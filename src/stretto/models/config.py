"""What a model is: one frozen record. ``hf_config`` reads and writes it as ``config.json``.

Families are rows of ``families.FAMILIES``; nothing here or in the transformer asks for a family by
name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stretto.errors import ArchitectureError
from stretto.models.families import FAMILIES, Family

__all__ = ["MoEConfig", "ModelConfig", "RopeConfig"]

ATTENTION_KINDS = ("causal", "full", "block")
SCORES = ("softmax", "sigmoid")
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: ``type`` one of default, linear, dynamic, yarn, llama3, longrope; ``theta``
    its base.

    ``params``: the numbers of that type under their Hugging Face keys (factor, beta_fast, ...).
    ``fp32``: rotate in float32 and cast back (LLaDA). ``partial``: the share of each head's
    dimensions, from the first on, that is rotated.
    """

    type: str = "default"
    theta: float = 10000.0
    params: Mapping[str, Any] = field(default_factory=dict)
    fp32: bool = False
    partial: float = 1.0


@dataclass(frozen=True)
class MoEConfig:
    """Routed feed-forward: ``experts`` of ``intermediate_size``, ``top_k`` of them a row.

    ``renormalize``: divide the chosen weights by their sum. ``cast``: round the weights to the
    model dtype before the product (qwen3_moe does, mixtral keeps float32). ``sparse``: which layers
    are routed.

    ``score``: "softmax" over the experts or "sigmoid" of each, then in float32. ``expert_bias``: a
    number for each expert that is added for the choice only. ``groups``: the experts stand in so
    many equal groups, and only the ``top_groups`` best (by their two best experts) are eligible.
    ``scale`` multiplies the weights. ``shared``: width of an expert that every row passes, 0 = none.
    """

    experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool
    cast: bool
    sparse: tuple[bool, ...]
    score: str = "softmax"
    expert_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    shared: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The facts of one transformer. ``H`` hidden, ``I`` intermediate, ``L`` layers, ``V``
    vocabulary rows.

    ``windows[l]``: sliding window of layer l in tokens, None = unlimited; key j is visible to query
    i iff i - w < j. ``attention``: "causal", "full" (all rows see each other) or "block" (rows see
    all blocks of ``block_size`` up to their own). ``shift``: logits of position i - 1 predict
    position i also for masked rows. ``stop_token_ids``: every id that ends a sequence (eos, and
    those of generation_config.json). ``source``: the ``config.json`` this came from, kept so that
    saving returns it.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    moe: MoEConfig | None = None
    attention: str = "causal"
    block_size: int = 1
    shift: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = field(default=(), compare=False)
    dtype: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_hidden_layers)
        if not self.stop_token_ids:
            object.__setattr__(self, "stop_token_ids", self.eos_token_ids)
        _check(self)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read a ``config.json``. Raises ArchitectureError for what this transformer does not
        cover.
        """
        from stretto.models.hf_config import read

        return read(data)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model: the source file's keys where they still hold, else
        fresh ones.
        """
        from stretto.models.hf_config import write

        return write(self)

    def changed(self, **changes: Any) -> ModelConfig:
        """A copy with some fields replaced."""
        return replace(self, **changes)


def _check(c: ModelConfig) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
    ):
        if getattr(c, name) < 1:
            raise ArchitectureError(f"{name}={getattr(c, name)}: must be at least 1")
    if c.num_key_value_heads < 1 or c.num_attention_heads % c.num_key_value_heads:
        raise ArchitectureError(
            f"num_attention_heads={c.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={c.num_key_value_heads}"
        )
    if c.head_dim % 2:
        raise ArchitectureError(f"head_dim={c.head_dim}: rotary embeddings need an even number")
    if c.attention not in ATTENTION_KINDS:
        raise ArchitectureError(
            f"attention={c.attention!r}: allowed are {', '.join(ATTENTION_KINDS)}"
        )
    if c.block_size < 1:
        raise ArchitectureError(f"block_size={c.block_size}: must be at least 1")
    if len(c.windows) != c.num_hidden_layers:
        raise ArchitectureError(f"{len(c.windows)} window sizes for {c.num_hidden_layers} layers")
    if c.rope.type not in ROPE_NEEDS:
        raise ArchitectureError(
            f"rope type {c.rope.type!r} is not supported: allowed are {', '.join(ROPE_NEEDS)}"
        )
    if c.head_dim * c.rope.partial % 2:
        raise ArchitectureError(
            f"partial_rotary_factor={c.rope.partial} of head_dim={c.head_dim}: rotary embeddings "
            "need an even number"
        )
    if c.moe is not None:
        _check_moe(c.moe)
    lacking = [k for k in ROPE_NEEDS[c.rope.type] if c.rope.params.get(k) is None]
    if lacking:
        raise ArchitectureError(f"rope type {c.rope.type!r} needs {', '.join(lacking)}")
    for what, token in (
        ("bos", c.bos_token_id),
        ("pad", c.pad_token_id),
        ("mask", c.mask_token_id),
    ):
        if token is not None and token >= c.vocab_size:
            raise ArchitectureError(
                f"{what}_token_id={token} is outside the vocabulary of {c.vocab_size}"
            )


def _check_moe(m: MoEConfig) -> None:
    if m.score not in SCORES:
        raise ArchitectureError(f"router score {m.score!r}: allowed are {', '.join(SCORES)}")
    if not 1 <= m.top_k <= m.experts:
        raise ArchitectureError(f"num_experts_per_tok={m.top_k}: allowed are 1..{m.experts}")
    if m.groups > 1 and (m.experts % m.groups or m.experts // m.groups < 2):
        raise ArchitectureError(
            f"n_group={m.groups}: {m.experts} experts must divide into groups of at least 2"
        )
    if not 1 <= m.top_groups <= m.groups or m.top_k > m.top_groups * (m.experts // m.groups):
        raise ArchitectureError(
            f"topk_group={m.top_groups}: allowed are 1..{m.groups}, with room for "
            f"num_experts_per_tok={m.top_k} experts"
        )
