"""One transformer for every family: what differs between them is data in ``ModelConfig``.

Legend: n rows (flat, no batch dimension), H hidden, A heads, G kv heads, D head_dim, V vocabulary.
Which rows see which keys is the business of the attention context (``context.py``). Parameter names
are those of the Hugging Face llama/qwen family, q/k/v and gate/up separate, so that adapters and
checkpoints fit without renaming.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stretto.errors import PromptError, UnsupportedError
from stretto.models.config import ModelConfig
from stretto.models.context import AttentionContext
from stretto.models.entries import Entry, enter
from stretto.models.linear import InferenceLinear, inference_linear
from stretto.models.moe import SparseMLP
from stretto.models.rope import Rotary, apply_rope

if TYPE_CHECKING:
    from stretto.models.checkpoint import Source

__all__ = ["MLP", "Attention", "Block", "RMSNorm", "Transformer"]

Angles = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times the weight (the order matters in bfloat16)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; the context decides what is visible."""

    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.qkv_bias)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.qkv_proj: InferenceLinear | None = None  # set by pack()

    def pack(self) -> None:
        """Fuse and reorder the weights for inference; the plain ones go."""
        self.qkv_proj = inference_linear(self.q_proj, self.k_proj, self.v_proj)
        self.o_proj = inference_linear(self.o_proj)
        del self.q_proj, self.k_proj, self.v_proj

    def _qkv(self, x: Tensor) -> list[Tensor]:
        """[n, H] -> q [n, A, D], k and v [n, G, D]"""
        if self.qkv_proj is None:
            parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        else:
            parts = self.qkv_proj(x).split(self.qkv_proj.sizes, -1)
        return [p.view(len(x), -1, self.head_dim) for p in parts]

    def forward(self, x: Tensor, angles: Angles, ctx: AttentionContext) -> Tensor:
        """x [n, H] -> [n, H]"""
        q, k, v = self._qkv(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = ctx.attend(self.layer, apply_rope(q, *angles), apply_rope(k, *angles), v)
        return self.o_proj(out.reshape(len(x), -1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); ``width`` in place of the config's intermediate size."""

    def __init__(self, c: ModelConfig, width: int | None = None):
        super().__init__()
        width = width or c.intermediate_size
        self.gate_proj = nn.Linear(c.hidden_size, width, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, width, bias=c.mlp_bias)
        self.down_proj = nn.Linear(width, c.hidden_size, bias=c.mlp_bias)
        self.gate_up_proj: InferenceLinear | None = None  # set by pack()

    def pack(self) -> None:
        """Fuse and reorder the weights for inference; the plain ones go."""
        self.gate_up_proj = inference_linear(self.gate_proj, self.up_proj)
        self.down_proj = inference_linear(self.down_proj)
        del self.gate_proj, self.up_proj

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is not None:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with its residual."""

    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(c, layer)
        moe = c.moe if c.moe is not None and c.moe.sparse[layer] else None
        shared = MLP(c, moe.shared) if moe is not None and moe.shared else None
        self.mlp = SparseMLP(c, shared) if moe is not None else MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, angles: Angles, ctx: AttentionContext) -> Tensor:
        """x [n, H] -> [n, H]"""
        x = x + self.self_attn(self.input_layernorm(x), angles, ctx)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Trunk(nn.Module):
    """The part of the names that starts with ``model.``"""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Transformer(nn.Module):
    """The model. ``Transformer(config)`` has random weights; ``checkpoint.load`` fills them from
    files.

    Pieces for callers that run layer by layer: ``embed``, ``rotary``, ``layers[l](x, angles,
    ctx)``, ``norm``, ``head``.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        super().__init__()
        self.config = config
        self.rotary = Rotary(config.rope, config.head_dim, config.max_position_embeddings)
        with torch.device("meta"):
            self.model = _Trunk(config)
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._packed_head: InferenceLinear | None = None
        self.source: Source | None = None  # set by checkpoint.load
        self.to(dtype)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal(0, std) matrices, zero biases, unit norms, from torch's global generator."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif "norm" in name:
                p.fill_(1.0)
            else:
                p.normal_(0.0, std)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [n] -> [n, H]"""
        return self.model.embed_tokens(tokens)

    def norm(self, x: Tensor) -> Tensor:
        """The final norm, [n, H] -> [n, H]"""
        return self.model.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Final-normed [k, H] -> logits [k, V] in the model's dtype"""
        if self._packed_head is not None:
            return self._packed_head(hidden)
        if self.config.tie_word_embeddings:
            return F.linear(hidden, self.model.embed_tokens.weight)
        return self.lm_head(hidden)

    logits = head

    def hidden(
        self,
        tokens: Tensor | None,
        positions: Tensor,
        ctx: AttentionContext,
        *,
        embeds: Tensor | None = None,
        taps: Sequence[int] = (),
        tapped: dict[int, Tensor] | None = None,
        entries: Sequence[Entry] = (),
        passed: Mapping[int, Callable[[Tensor], None]] | None = None,
    ) -> Tensor:
        """The final-normed states [n, H] of ``tokens`` int64 [n] (or ``embeds`` [n, H]) at
        ``positions`` [n].

        ``taps``: states to put into ``tapped``: 0 = the embeddings, l = the output of layer l
        (1-based), before the final norm. ``entries``: rows that get their state behind a layer; what they
        are before is not defined. ``passed[l]`` is called with the output of layer l before the layers
        above it run.
        """
        if (tokens is None) == (embeds is None):
            raise PromptError("hidden() takes tokens or embeds, exactly one of them")
        x = self.embed(tokens) if embeds is None else embeds
        if entries:
            x = enter(x, entries, 0)
        if tapped is not None and 0 in taps:
            tapped[0] = x
        angles = self.rotary(positions, x.dtype)
        for depth, layer in enumerate(self.model.layers, 1):
            x = layer(x, angles, ctx)
            if entries:
                x = enter(x, entries, depth)
            if tapped is not None and depth in taps:
                tapped[depth] = x
            if passed is not None and depth in passed:
                passed[depth](x)
        return self.norm(x)

    @property
    def packed(self) -> bool:
        return self._packed_head is not None

    def pack(self, *, block: int = 0) -> Transformer:
        """Fuse q/k/v and gate/up and reorder every matrix for this processor: faster, but only for
        inference.

        Only the reordered copy is kept (a tied embedding stays beside its reordered head). A packed
        model cannot be trained or saved. ``block``: see ``InferenceLinear``.
        """
        if any(".lora_" in name for name, _ in self.named_parameters()):
            raise UnsupportedError("the model carries an adapter: merge_lora() it before pack()")
        if not self.packed:
            for layer in self.model.layers:
                layer.self_attn.pack()
                layer.mlp.pack()
            tied = self.config.tie_word_embeddings
            weight = self.model.embed_tokens.weight if tied else self.lm_head.weight
            self._packed_head = InferenceLinear([weight])
            if not tied:
                del self.lm_head
        for layer in self._inference_linears():
            layer.block = block
        return self.requires_grad_(False)

    def _inference_linears(self) -> Iterator[InferenceLinear]:
        for module in self.modules():
            if isinstance(module, InferenceLinear):
                yield module
            elif isinstance(module, SparseMLP) and module.experts.packed:
                yield from (linear for pair in module.experts.packed for linear in pair)

    def save(self, path: str | os.PathLike, **options: Any) -> None:
        """Write a checkpoint that transformers reads; options of ``checkpoint.save``."""
        from stretto.models.checkpoint import save

        save(self, path, **options)

    def forward(self, tokens: Tensor, positions: Tensor, ctx: AttentionContext) -> Tensor:
        """Logits [n, V] of every row; ``hidden`` and ``logits`` apart are cheaper when few rows
        count.
        """
        return self.head(self.hidden(tokens, positions, ctx))
