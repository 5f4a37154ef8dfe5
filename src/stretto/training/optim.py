"""Optimizers: Muon for the matrices of the layers, AdamW for everything else, one schedule for both.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by the nearest semi-orthogonal matrix, found with five
Newton-Schulz iterations. On models of a few million parameters it needs about half of AdamW's steps; matrices of
one shape are orthogonalised together, so that the cost stays below a tenth of a step.
Legend of shapes: p matrices of one shape, r rows, c columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["Muon", "MuonAdamW", "orthogonalise", "schedule"]

_NS = (3.4445, -4.7750, 2.0315)  # quintic coefficients of the reference implementation


def orthogonalise(g_prc: Tensor, steps: int = 5) -> Tensor:
    """The approximate polar factor of each matrix of ``g_prc`` [p, r, c] (singular values within 0.7..1.2)."""
    a, b, c = _NS
    x = g_prc.transpose(1, 2) if g_prc.shape[1] > g_prc.shape[2] else g_prc
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x.transpose(1, 2) if g_prc.shape[1] > g_prc.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Muon over matrices [r, c] and stacks of matrices [e, r, c] (experts), with decoupled weight decay.

    The update has root-mean-square entry ``lr * 0.2`` whatever the shape (Moonlight, 2025), so that ``lr`` is on
    AdamW's scale.
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape[-2:]].append(p)
            for same in shapes.values():
                self._step_shape(same, group)

    def _step_shape(self, params: list[Tensor], group: dict) -> None:
        momentum, lr = group["momentum"], group["lr"]
        moments = []
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            nesterov = p.grad.lerp(state["momentum_buffer"], momentum)
            moments.append(nesterov.reshape(-1, *p.shape[-2:]))
        update = orthogonalise(torch.cat(moments))
        update *= 0.2 * math.sqrt(max(update.shape[1:]))
        for p, u in zip(params, update.split([m.shape[0] for m in moments]), strict=True):
            p.mul_(1 - lr * group["weight_decay"]).sub_(u.reshape(p.shape), alpha=lr)


class MuonAdamW:
    """One optimizer out of two: matrices inside the layers go to Muon, embeddings, routers, norms to AdamW."""

    def __init__(
        self, model: nn.Module, *, lr: float, adam_lr: float, weight_decay: float, muon: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
    ):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = {id(p): n for n, p in named}
        matrices = [p for n, p in named if muon and p.ndim >= 2 and ".layers." in f".{n}" and "mlp.gate." not in n]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        decayed, plain = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        fused = {"fused": True} if all(p.device.type in {"cpu", "cuda"} for p in rest) else {}
        self.parts: list[tuple[torch.optim.Optimizer, float]] = []
        if used := [g for g in groups if g["params"]]:
            self.parts.append((torch.optim.AdamW(used, lr=adam_lr, betas=betas, eps=1e-9, **fused), adam_lr))
        if matrices:
            self.parts.append((Muon(matrices, lr=lr, weight_decay=weight_decay), lr))

    def step(self, factor: float) -> None:
        """One update with every learning rate multiplied by ``factor``."""
        for optimizer, lr in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state as flat names ``parameter|key`` -> tensor, for safetensors."""
        return {
            f"{self.names[id(p)]}|{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for optimizer, _ in self.parts for p, state in optimizer.state.items() for key, value in state.items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`tensors`, for the same model."""
        by_name: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            parameter, key = name.rsplit("|", 1)
            by_name[parameter][key] = value
        for optimizer, _ in self.parts:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if state := by_name.get(self.names[id(p)]):
                        optimizer.state[p] = {k: v.to(p.device).clone() for k, v in state.items()}


def schedule(progress: float, step: int, *, warmup: int, decay: float, floor: float = 0.0) -> float:
    """Warm-up, stable, decay (WSD): the factor on the learning rate at ``progress`` in 0..1 of the budget.

    Linear over the first ``warmup`` steps, then 1, then linear to ``floor`` over the last ``decay`` of the budget.
    """
    ramp = min(1.0, (step + 1) / max(warmup, 1))
    left = (1.0 - min(progress, 1.0)) / max(decay, 1e-9)
    return ramp * (floor + (1 - floor) * min(1.0, left))
