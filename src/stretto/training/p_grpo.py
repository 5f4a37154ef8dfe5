"""P-GRPO (ThreadWeaver, arXiv 2512.07843): policy optimisation for right answers on a short critical path.

A rollout is a whole answer, however many threads it had: its units are the completions that made it, each behind what
it saw. Reward r = right (1 + rho min(eta, eta_max)), eta = 1 - longest / total: speed is only paid for right answers.
Advantage A = r - mean(r) over the k rollouts of a prompt, *not* divided by their spread (which would blow the small
speed term up to unit variance when all are right); every generated token of every unit of a rollout has its A. Rollouts
of a prompt share tries: what they have in common is evaluated once. Loss = -sum of clipped ratio times A, divided by
all tokens of the batch; no distance to the initial model, no entropy. Works for whatever reports its units, total and
longest path. Legend: k tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stretto.errors import OptionError
from stretto.models.transformer import Transformer
from stretto.training.nets import PackedNet
from stretto.training.optim import MuonAdamW
from stretto.training.policy import Verifier, clipped, some, verdict, zscore
from stretto.training.trie import TrieBatch, Unit, logps, pack_tries, size_of

__all__ = ["PGRPO", "Rollout", "Step", "advantages", "p_grpo", "policy_loss", "reward"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PGRPO:
    """The settings; the paper's values where nothing else is said. ``normalise``: "mean" (r - mean), or "std" (divided
    by the spread of the group too: plain GRPO, for comparison)."""

    group_size: int = 8
    prompts_per_step: int = 16  # paper: 128
    rho: float = 0.5
    eta_max: float = 0.2
    normalise: Literal["mean", "std"] = "mean"
    clip: float = 0.2
    clip_high: float = 0.28
    updates: int = 1  # minibatches of prompts, an update each
    lr: float = 1e-4  # paper, 8B: 1e-6
    max_tokens: int = 256
    length: int = 512  # places of a row of the training pack, more where a group needs it
    rows: int = 4  # rows evaluated together
    seed: int = 0

    def __post_init__(self) -> None:
        if self.normalise not in ("mean", "std"):
            raise OptionError("normalise", self.normalise, "mean or std")
        if not 1 <= self.updates <= self.prompts_per_step:
            raise OptionError("updates", self.updates, "a whole number from 1 to prompts_per_step")


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer. ``units``: what was generated, each behind its context; ``tokens``: the answer's ids; ``total`` and
    ``longest``: all its tokens, and those of its critical path; ``complete``: it ended by itself."""

    units: Sequence[Unit]
    tokens: list[int]
    total: int
    longest: int
    complete: bool
    blocks: int = 0
    formed: bool = True  # its tags are well formed

    @property
    def eta(self) -> float:
        return 1 - self.longest / self.total if self.total else 0.0


@dataclass(slots=True)
class Step:
    """What one step saw and did."""

    step: int
    accuracy: float
    reward: float
    total: float
    longest: float
    blocks: float  # share of answers with at least one
    formed: float
    loss: float = 0.0
    clip_fraction: float = 0.0
    errors: int = 0  # verifier calls that raised; counted as wrong
    tokens: int = 0  # generated ones, of all rollouts
    skipped: str = ""
    advantages: list[float] = field(default_factory=list)


Roll = Callable[[Transformer, Sequence[Sequence[int]], int], list[list[Rollout]]]
"""(model, prompts, seed) -> the group of rollouts of each prompt"""


def reward(right: float, eta: float, *, rho: float = 0.5, eta_max: float = 0.2) -> float:
    """r = 1[right] (1 + rho min(eta, eta_max))"""
    return right * (1 + rho * min(eta, eta_max))


def advantages(rewards: Sequence[float], normalise: str = "mean") -> np.ndarray:
    """float64 [group]; they sum to 0, and are exactly 0 where all rewards are equal."""
    r = np.asarray(rewards, float)
    if np.ptp(r) == 0:
        return np.zeros_like(r)
    return zscore(r) if normalise == "std" else r - r.mean()


def policy_loss(logp: Tensor, old: Tensor, gain: Tensor, against: Tensor, s: PGRPO) -> tuple[Tensor, Tensor]:
    """(-sum of min(rho A, clip(rho) A), share of clipped tokens). All [k]: the sums of the positive and of the negative
    advantages (without their sign) of the rollouts that share the token."""
    up, high = clipped(logp, old, gain, s.clip, s.clip_high)
    down, low = clipped(logp, old, -against, s.clip, s.clip_high)
    return -(up + down).sum(), ((high & (gain > 0)) | (low & (against > 0))).float().mean()


def p_grpo(
    model: Transformer, prompts: Sequence[tuple[Sequence[int], Verifier]], settings: PGRPO, *, steps: int, roll: Roll,
    pad_id: int, optimizer: MuonAdamW | None = None, clock: Callable[[], bool] | None = None,
    first: int = 0,
) -> Iterator[Step]:
    """Train ``model`` in place on prompts with verifiers of the answer's ids; yields after every step.

    ``clock`` false ends the run early; ``first``: number of the first step (a resumed run).
    """
    s = settings
    optimizer = optimizer or MuonAdamW(model, lr=s.lr, adam_lr=s.lr, weight_decay=0.0, muon=False)
    for step in range(first, steps):
        if clock is not None and not clock():
            return
        chosen = some(prompts, step, s.prompts_per_step)
        groups = roll(model, [p for p, _ in chosen], s.seed * 1009 + step)
        seen, taught = _judged(groups, [v for _, v in chosen], s, step)
        if any(seen.advantages):
            _update(model, optimizer, taught, s, seen, pad_id)
        else:
            seen.skipped = "all rewards of every group are equal"
        yield seen


Group = list[list[Unit]]  # the units of each rollout of a prompt, with their advantages as weights


def _judged(
    groups: Sequence[Sequence[Rollout]], verifiers: Sequence[Verifier], s: PGRPO, step: int
) -> tuple[Step, list[Group]]:
    """What was seen, and what is learnt from it."""
    taught: list[Group] = []
    rows, errors, every = [], 0, []
    for group, verify in zip(groups, verifiers, strict=True):
        rewards = []
        for r in group:
            right, raised = verdict(verify, r.tokens) if r.complete and r.formed else (0.0, False)
            errors += raised
            rewards.append(reward(right, r.eta, rho=s.rho, eta_max=s.eta_max))
            rows.append((right, rewards[-1], r.total, r.longest, r.blocks > 0, r.formed))
        a = advantages(rewards, s.normalise).tolist()
        every += a
        taught.append([[replace(u, weight=w) for u in r.units] for r, w in zip(group, a, strict=True)])
    mean = np.mean(rows, axis=0).tolist()
    return Step(step, *mean, errors=errors, advantages=every, tokens=_generated(taught)), taught


def _generated(taught: Sequence[Group]) -> int:
    return sum(len(u.tokens) - u.learnt for group in taught for units in group for u in units)


def _update(
    model: Transformer, optimizer: MuonAdamW, taught: list[Group], s: PGRPO, seen: Step, pad_id: int,
) -> None:
    """One pass over the batch, an update for each minibatch; the old law is that of the rollouts."""
    size, net = -(-len(taught) // s.updates), PackedNet(model)
    parts = [taught[i : i + size] for i in range(0, len(taught), size)]
    batches = [_rows(part, s, pad_id) for part in parts]
    olds: list[list[Tensor | None]] = [[None] * len(batch) for batch in batches]
    if len(parts) > 1:
        with torch.no_grad():
            olds = [[logps(net, rows, _places(rows)) for rows in batch] for batch in batches]
    for part, batch, old in zip(parts, batches, olds, strict=True):
        for rows, before in zip(batch, old, strict=True):
            places = _places(rows)
            logp = logps(net, rows, places)
            before = logp.detach() if before is None else before
            loss, outside = policy_loss(logp, before, rows.weight[places], rows.against[places], s)
            (loss / _generated(part)).backward()
            seen.loss += float(loss.detach()) / seen.tokens
            seen.clip_fraction += float(outside) / sum(map(len, batches))
        if batch:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(1.0)


def _places(rows: TrieBatch) -> Tensor:
    return ((rows.weight > 0) | (rows.against > 0)) & (rows.parent >= 0)


def _rows(taught: Sequence[Group], s: PGRPO, pad_id: int) -> list[TrieBatch]:
    """The groups that teach something; of each, as many rollouts share a trie as fit into a row."""
    tries: list[list[Unit]] = []
    for group in taught:
        for k, units in enumerate(u for u in group if u and u[0].weight):
            both = [*tries[-1], *units] if k else units
            if k and size_of(both) <= s.length:
                tries[-1] = both
            else:
                tries.append(list(units))
    if not tries:
        return []
    packed = pack_tries(tries, max(s.length, *map(size_of, tries)), pad_id=pad_id)
    return [
        TrieBatch(*(getattr(packed, f.name)[i : i + s.rows] for f in fields(packed)))
        for i in range(0, len(packed.tokens), s.rows)
    ]
