"""A transformer as the objectives see it: rows of equal length and a mask for each, optionally compiled.

Legend of shapes: b rows, t places, H width, V vocabulary.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn

from stretto.models.context import AttentionContext, PackedContext
from stretto.models.moe import SparseMLP
from stretto.models.transformer import Transformer

__all__ = ["PackedNet", "balance_loss", "fast_dtype", "initialise", "upcycle"]


class PackedNet:
    """``hidden`` and ``logits`` of ``model`` over packed rows (see ``objectives.Net``)."""

    def __init__(self, model: Transformer, *, compiled: bool = False, balance: bool = False):
        self.model = model
        for module in model.modules():
            if isinstance(module, SparseMLP):
                module.record = balance
        self._run = torch.compile(self._hidden, dynamic=False) if compiled else self._hidden

    def hidden(self, tokens_bt: Tensor, positions_bt: Tensor, mask_btt: Tensor | AttentionContext) -> Tensor:
        """``mask_btt``: bool, or the attention context of all places."""
        return self._run(tokens_bt, positions_bt, mask_btt)

    def logits(self, hidden_kH: Tensor) -> Tensor:
        return self.model.logits(hidden_kH)

    def balance(self) -> Tensor:
        return balance_loss(self.model)

    def _hidden(self, tokens_bt: Tensor, positions_bt: Tensor, mask_btt: Tensor | AttentionContext) -> Tensor:
        b, t = tokens_bt.shape
        ctx = mask_btt
        if isinstance(mask_btt, Tensor):
            ctx = PackedContext([t] * b, mask_btt, device=tokens_bt.device)
        return self.model.hidden(tokens_bt.flatten(), positions_bt.flatten(), ctx).view(b, t, -1)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, *, layers: int) -> None:
    """Weights from ``seed``: unit-variance matrices, small embeddings, outputs of the residual branches scaled down."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.fill_(1.0)
        elif name.endswith("bias"):
            p.zero_()
        else:
            std = 0.02 if "embed" in name else p.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                std /= math.sqrt(2 * layers)
            p.copy_(torch.randn(p.shape, generator=generator) * std)


@torch.no_grad()
def upcycle(base: Transformer, model: Transformer, seed: int) -> None:
    """Start ``model`` from ``base``: parameters of the same name are copied; experts are slices of the base's MLP.

    Each expert takes as many of the MLP's units as it holds, drawn at random, with outputs scaled so that their mean
    over experts is the MLP. Routers keep their random start.
    """
    source = dict(base.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name in source:
            p.copy_(source[name])
    for layer, old in zip(model.layers, base.layers, strict=True):
        if not isinstance(layer.mlp, SparseMLP):
            continue
        experts, units = layer.mlp.experts, len(old.mlp.gate_proj.weight)
        size = experts.down_proj.shape[2]
        for e in range(len(experts.down_proj)):
            chosen = torch.randperm(units, generator=generator)[:size]
            gate, up = old.mlp.gate_proj.weight[chosen], old.mlp.up_proj.weight[chosen]
            experts.gate_up_proj[e] = torch.cat([gate, up])
            experts.down_proj[e] = old.mlp.down_proj.weight[:, chosen] * (units / size)


def balance_loss(model: nn.Module) -> Tensor:
    """Switch load-balance loss, mean over routed layers: E * sum_e share_e * probability_e, 1 when even.

    Reads the router logits [n, E] of the last forward; ``share`` counts the top-k choices.
    """
    losses = []
    for module in model.modules():
        if isinstance(module, SparseMLP) and module.router_logits is not None:
            p_nE = module.router_logits.float().softmax(-1)
            chosen = torch.zeros_like(p_nE).scatter(1, p_nE.topk(module.top_k, -1).indices, 1.0)
            share_E = chosen.mean(0) / module.top_k
            losses.append(p_nE.shape[1] * (share_E * p_nE.mean(0)).sum())
    return torch.stack(losses).mean()


def fast_dtype(
    device: torch.device | str = "cpu", *, width: int = 192, rows: int = 8, places: int = 256
) -> torch.dtype | None:
    """bfloat16 where a training step under autocast is clearly faster in it (a GPU, AMX), else None.

    A measurement of about a second on a CPU, of one layer with its loss, forwards and backwards: products alone are
    faster in bfloat16 on AVX-512 processors whose whole step is half as fast, for the casts and the losses.
    """
    device = torch.device(device)
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, norm_first=True, batch_first=True).to(device)
    head = nn.Linear(width, 2048).to(device)
    x = torch.randn(rows, places, width, device=device)
    aims = torch.zeros(rows * places, dtype=torch.long, device=device)

    def step(dtype: torch.dtype | None) -> float:
        start = time.perf_counter()
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            logits = head(layer(x)).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits.float(), aims)
        loss.backward()
        loss.item()
        return time.perf_counter() - start

    plain, half = (min([step(dtype) for _ in range(4)][1:]) for dtype in (None, torch.bfloat16))
    return torch.bfloat16 if half * 1.1 < plain else None
