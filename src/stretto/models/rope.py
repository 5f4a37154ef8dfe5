"""Rotary position embedding, half-split (first half of a head with its second half), and its
long-context forms.

Legend: n rows, D head_dim, F = D/2 frequencies. Frequencies and angles are float32; cos and sin are
cast to the dtype of the activations. Formulas: transformers' ``modeling_rope_utils`` (Apache-2.0),
the YaRN and LongRoPE papers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stretto.models.config import RopeConfig

__all__ = ["Rotary", "apply_rope"]


class Rotary:
    """cos and sin for positions. Holds no parameter, so that casting a model never rounds the
    frequencies.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, max_positions: int):
        self.rope, self.head_dim, self.max_positions = rope, head_dim, max_positions
        self._rotated = int(head_dim * rope.partial)
        self._cached: tuple[int, torch.device, Tensor] | None = None
        self.scale = _attention_factor(rope, max_positions)

    @property
    def cacheable(self) -> int | None:
        """The positions below which rotated keys stay valid as a text grows; None = all."""
        if self.rope.type == "dynamic":
            return self.max_positions
        if self.rope.type == "longrope":
            return self.rope.params.get("original_max_position_embeddings") or self.max_positions
        return None

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions int [n] -> cos, sin [n, 1, R] of ``dtype`` (float32 where the family rotates
        so); R = D, or the rotated part of a head.
        """
        angles = positions.float()[:, None] * self._frequencies(positions)
        angles = torch.cat((angles, angles), -1)[:, None, :]
        dtype = torch.float32 if self.rope.fp32 and dtype.itemsize < 4 else dtype
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)

    def _frequencies(self, positions: Tensor) -> Tensor:
        length = self.cacheable or 1
        if self.cacheable is not None and len(positions):
            length = max(length, int(positions.max()) + 1)
        key = (length, positions.device)
        if self._cached is None or self._cached[:2] != key:
            freqs = _inverse_frequencies(self.rope, self._rotated, self.max_positions, length)
            self._cached = (*key, freqs.to(positions.device))
        return self._cached[2]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [n, heads, D], cos and sin [n, 1, R] -> x with its first R dimensions rotated, in x's
    dtype.
    """
    rotary = cos.shape[-1]
    if rotary < x.shape[-1]:
        return torch.cat((apply_rope(x[..., :rotary], cos, sin), x[..., rotary:]), -1)
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), -1)
    return (x * cos + rotated * sin).to(x.dtype)


def _inverse_frequencies(rope: RopeConfig, dim: int, max_positions: int, length: int) -> Tensor:
    """float32 [F] for a text of ``length`` tokens."""
    p, theta = rope.params, rope.theta
    if rope.type == "dynamic":
        factor = p["factor"]
        if length > max_positions:
            theta *= (factor * length / max_positions - (factor - 1)) ** (dim / (dim - 2))
    waves = theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    freqs = 1.0 / waves
    if rope.type == "linear":
        return freqs / p["factor"]
    if rope.type == "llama3":
        return _llama3(freqs, rope)
    if rope.type == "yarn":
        return _yarn(freqs, rope, dim, max_positions)
    if rope.type == "longrope":
        original = p.get("original_max_position_embeddings") or max_positions
        factors = p["long_factor"] if length > original else p["short_factor"]
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * waves)
    return freqs


def _llama3(freqs: Tensor, rope: RopeConfig) -> Tensor:
    """Long waves are stretched by ``factor``, short ones kept, a linear blend between."""
    p = rope.params
    original, low, high = (
        p["original_max_position_embeddings"],
        p["low_freq_factor"],
        p["high_freq_factor"],
    )
    waves = 2 * math.pi / freqs
    blend = (original / waves - low) / (high - low)
    mixed = (1 - blend) * freqs / p["factor"] + blend * freqs
    out = torch.where(waves > original / low, freqs / p["factor"], freqs)
    between = (waves >= original / high) & (waves <= original / low)
    return torch.where(between, mixed, out)


def _yarn(freqs: Tensor, rope: RopeConfig, dim: int, max_positions: int) -> Tensor:
    p = rope.params
    original = p.get("original_max_position_embeddings") or max_positions

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return freqs / p["factor"] * ramp + freqs * (1 - ramp)


def _attention_factor(rope: RopeConfig, max_positions: int) -> float:
    """What cos and sin are multiplied by."""
    p = rope.params
    if rope.type not in ("yarn", "longrope"):
        return 1.0
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    original = p.get("original_max_position_embeddings") or max_positions
    if rope.type == "longrope":
        factor = p.get("factor") or max_positions / original
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))

    def mscale(m: float = 1.0) -> float:
        return 1.0 if p["factor"] <= 1 else 0.1 * m * math.log(p["factor"]) + 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(p["mscale"]) / mscale(p["mscale_all_dim"])
    return mscale()
