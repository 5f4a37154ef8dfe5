"""Attention contexts: who sees whom. Those of cached rows are in ``pool_context.py``.

Legend: n rows, A heads, G kv heads (R = A/G query heads share one), D head_dim.
Masks are bool, True = visible. ``attend`` gets q and k already rotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.errors import OptionError, PromptError

if TYPE_CHECKING:
    from stretto.models.config import ModelConfig
    from stretto.models.transformer import Transformer

__all__ = ["AttentionContext", "PackedContext", "masked_attention", "packed", "plain_logits"]

Kind = str | tuple[str, int] | Tensor


class AttentionContext(Protocol):
    """What a layer asks for its attention."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [n, A, D], k and v [n, G, D], rotated -> [n, A, D]"""
        ...


class PackedContext:
    """Segments of ``lengths`` rows side by side, without a cache: training and scoring.

    ``kind``: "causal", "full", ("block", B) = causal over blocks of B rows and full inside one, or
    a bool mask: [t, t] for each of the segments (all of length t), [b, t, t] one for each, or [n,
    n] over all rows. ``windows``: sliding window per layer in rows (None = unlimited); the rows of
    a segment are then consecutive positions.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        kind: Kind = "causal",
        *,
        windows: Sequence[int | None] = (),
        device: str | torch.device = "cpu",
    ):
        self.lengths = [int(t) for t in lengths]
        if not self.lengths or min(self.lengths) < 1:
            raise PromptError(f"segment lengths {self.lengths} must all be at least 1")
        self._kind, self._windows, self._device = kind, windows, torch.device(device)
        self._masks: dict[int | None, Tensor | None] = {}
        if isinstance(kind, Tensor):
            self._check_mask(kind)
        elif kind not in ("causal", "full") and not _is_block(kind):
            raise OptionError("kind", kind, "causal, full, ('block', B >= 1) or a bool mask")
        self._whole = isinstance(kind, Tensor) and len(set(self.lengths) | {kind.shape[-1]}) > 1
        self._equal = len(set(self.lengths)) == 1 and not self._whole
        self._pad = None if self._equal or self._whole else _Padding(self.lengths, self._device)

    def _check_mask(self, mask: Tensor) -> None:
        n, lengths = mask.shape[-1], set(self.lengths)
        fits = lengths == {n} or (mask.dim() == 2 and n == sum(self.lengths))
        fits &= mask.dim() == 2 or len(mask) == len(self.lengths)
        if mask.dim() not in (2, 3) or mask.shape[-2] != n or not fits or mask.dtype != torch.bool:
            raise OptionError(
                "kind", f"mask {tuple(mask.shape)} of {mask.dtype}", "bool, square, of the lengths"
            )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self._windows[layer] if self._windows else None
        if self._whole:
            return masked_attention(q[None], k[None], v[None], self._mask(window, len(q)))[0]
        if self._pad is not None:
            q, k, v = self._pad.spread(q), self._pad.spread(k), self._pad.spread(v)
            return self._pad.collect(self._sdpa(q, k, v, window))
        b, t = len(self.lengths), self.lengths[0]
        out = self._sdpa(*(x.view(b, t, *x.shape[1:]) for x in (q, k, v)), window)
        return out.reshape(q.shape)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """[b, t, heads, D] of each -> [b, t, A, D]"""
        t = q.shape[1]
        if self._kind == "causal" and (window is None or window >= t):
            return masked_attention(q, k, v, None, causal=True)  # padding stands right, so nobody real sees it
        return masked_attention(q, k, v, self._mask(window, t))

    def _mask(self, window: int | None, t: int) -> Tensor | None:
        if window not in self._masks:
            self._masks[window] = self._build(window, t)
        return self._masks[window]

    def _build(self, window: int | None, t: int) -> Tensor | None:
        at = torch.arange(t, device=self._device)
        i, j = at[:, None], at[None, :]
        if isinstance(self._kind, Tensor):
            mask = self._kind.to(self._device)
            mask = mask[:, None] if mask.dim() == 3 else mask
        elif self._kind == "causal":
            mask = j <= i
        elif self._kind == "full":
            mask = None
        else:
            block = self._kind[1]
            mask = j // block <= i // block
        if window is not None and window < t:
            near = (i - j) < window
            mask = near if mask is None else mask & near
        if self._pad is not None and self._kind != "causal":
            real = self._pad.real[:, None, None, :]
            mask = real if mask is None else mask & real
        return mask


def _is_block(kind: object) -> bool:
    return isinstance(kind, tuple) and len(kind) == 2 and kind[0] == "block" and kind[1] >= 1


class _Padding:
    """Rows of unequal segments <-> [b, T, ...], padded on the right."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.shape = (len(lengths), max(lengths))
        lens = torch.tensor(lengths, device=device)
        self.real = torch.arange(self.shape[1], device=device) < lens[:, None]  # [b, T]
        self._index = self.real.flatten().nonzero()[:, 0]

    def spread(self, x: Tensor) -> Tensor:
        out = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return out.index_copy(0, self._index, x).view(*self.shape, *x.shape[1:])

    def collect(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *x.shape[2:]).index_select(0, self._index)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool = False) -> Tensor:
    """[b, t, A, D], [b, m, G, D] twice, mask broadcastable to [b, A, t, m] -> [b, t, A, D]"""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def packed(
    config: ModelConfig, lengths: Sequence[int], *, device: str | torch.device = "cpu"
) -> PackedContext:
    """The context in which the model was trained: its own attention kind and windows."""
    kind: Kind = ("block", config.block_size) if config.attention == "block" else config.attention
    windows = config.windows if any(w is not None for w in config.windows) else ()
    return PackedContext(lengths, kind, windows=windows, device=device)


@torch.no_grad()
def plain_logits(model: Transformer, ids: Sequence[int]) -> Tensor:
    """float32 [n, V] of one text, without cache or batch: the reference that every faster path must equal."""
    if not len(ids):
        raise PromptError("the prompt is empty: give at least one token")
    tokens = torch.as_tensor(ids, dtype=torch.int64, device=model.device)
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.config.vocab_size:
        raise PromptError(f"token ids must lie in 0..{model.config.vocab_size - 1}")
    ctx = packed(model.config, [len(tokens)], device=model.device)
    return model(tokens, torch.arange(len(tokens), device=model.device), ctx).float()
