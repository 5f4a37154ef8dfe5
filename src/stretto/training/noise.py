"""Forward noise of masked diffusion: which answer places are hidden, and the weight of each in the bound.

Both laws give the same expected loss (RADD, 2024; LLaDA, 2025): sum over l of 1/l times the mean, over sets of l
hidden places, of the summed cross-entropy. Legend of shapes: m maskable places, g groups (documents or blocks).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["EPSILON", "Law", "hide", "last_first", "ranks", "stratified"]

EPSILON = 1e-3  # smallest masking probability, so that 1/p stays finite (LLaDA)
Law = Literal["bernoulli", "count"]


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """``n`` draws of U(0, 1), one in each of ``n`` equal strata, in random order: float64 [n]."""
    strata = torch.randperm(n, generator=generator)
    return (strata + torch.rand(n, generator=generator, dtype=torch.float64)) / max(n, 1)


def hide(
    group_m: Tensor, generator: torch.Generator, law: Law = "bernoulli", suffix: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``(hidden, weight)``: bool [m] and float32 [m], one noise level per group.

    ``bernoulli``: t ~ U(0, 1), each place hidden with p = (1 - eps) t + eps, weight 1/p.
    ``count``: l ~ U{1..n} of the group's n places are hidden, weight n/l: no group is wasted and the variance is
    lower, which matters for blocks of a few places. ``suffix``: in this share of the groups the last l places are
    hidden instead of random ones (law ``count``; ``group_m`` then has the places of a group in ascending order).
    """
    if suffix and law != "count":
        raise ValueError(f"suffix={suffix} with law {law!r}: last places are hidden by the law 'count' only")
    _, inverse_m, counts_g = torch.unique(group_m, return_inverse=True, return_counts=True)
    level_g = stratified(len(counts_g), generator)
    u_m = torch.rand(len(group_m), generator=generator, dtype=torch.float64)
    if law == "bernoulli":
        p_m = ((1 - EPSILON) * level_g + EPSILON)[inverse_m]
        return u_m < p_m, (1 / p_m).float()
    amount_g = (level_g * counts_g).long().add(1).minimum(counts_g)
    u_m = last_first(u_m, inverse_m, suffix, generator)
    rank_m = _rank(inverse_m, counts_g, u_m)
    return rank_m < amount_g[inverse_m], (counts_g / amount_g)[inverse_m].float()


def last_first(u_m: Tensor, group_m: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """float64 [m]: ``u_m``, and in a share of the groups (0..g-1) keys that fall from place to place, so that the last
    places of the group have the smallest."""
    if not share or not len(u_m):
        return u_m
    chosen_g = torch.rand(int(group_m.max()) + 1, generator=generator) < share
    falling_m = 1 - torch.arange(1, len(u_m) + 1, dtype=torch.float64) / (len(u_m) + 1)
    return torch.where(chosen_g[group_m], falling_m, u_m)


def ranks(group_m: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """``(rank, group, count)``: int64 [m] the place's number in a random permutation of its group, int64 [m] the group
    as 0..g-1, int64 [g] how many places each has. Places of rank < c form a random set of c places: sets nest."""
    _, inverse_m, counts_g = torch.unique(group_m, return_inverse=True, return_counts=True)
    u_m = torch.rand(len(group_m), generator=generator, dtype=torch.float64)
    return _rank(inverse_m, counts_g, u_m), inverse_m, counts_g


def _rank(inverse_m: Tensor, counts_g: Tensor, u_m: Tensor) -> Tensor:
    """int64 [m]: how many places of the same group have a smaller ``u``."""
    order_m = torch.argsort(inverse_m + u_m)
    start_g = counts_g.cumsum(0) - counts_g
    rank_m = torch.empty_like(order_m)
    rank_m[order_m] = torch.arange(len(order_m)) - start_g[inverse_m[order_m]]
    return rank_m
