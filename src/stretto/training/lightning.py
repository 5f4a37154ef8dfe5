"""LightningRL (arXiv 2603.13319): policy optimisation of a block diffusion model for right answers in few forwards.

Two rewards a response: r1 = correct, r2 = tokens per forward. Each is normalised in its group on its own, then added;
the advantage is the sum normalised over the batch. Loss: clipped ratio, a token-level anchor on right responses, and
the distance to the initial model. Legend: G responses of a group, k labels (tokens) of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from stretto.errors import OptionError, UnsupportedError
from stretto.models.transformer import Transformer
from stretto.training.nets import PackedNet
from stretto.training.optim import MuonAdamW
from stretto.training.policy import CLAMP, Verifier, clipped, rollout_engine, some, verdict, zscore
from stretto.training.rollouts import Kind, Path, logps, path_rows, roll_out

__all__ = ["Lightning", "Step", "advantages", "keep_group", "lightning", "policy_loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lightning:
    """The settings, with the paper's values as defaults where a tiny model does not need others.

    ``speed_only_if_correct``: r2 is normalised over right responses only and 0 for wrong ones (safer: published, a
    wrong fast answer may have a positive advantage). ``normalise``: "decoupled", or "sum" (the baseline that lets the
    larger scale hide the other).
    """

    group_size: int = 8  # paper: 32
    prompts_per_step: int = 16  # paper: 128
    tpf_weight: float = 1.0
    nll_weight: float = 0.1
    kl_beta: float = 0.01
    clip: float = 0.2
    clip_high: float = 0.2
    tpf_gap: float = 0.01  # delta: a group whose tokens per forward differ by less teaches nothing
    lr: float = 1e-4  # paper, 8B: 1e-6
    logp: Kind = "trace"
    shrink: int = 1
    threshold: float = 0.9
    temperature: float = 1.0
    max_tokens: int = 64
    micro_batch: int = 16
    speed_only_if_correct: bool = False
    normalise: str = "decoupled"
    seed: int = 0


@dataclass(slots=True)
class Step:
    """What one step saw and did; ``skipped``: why there was no update."""

    step: int
    accuracy: float
    tokens_per_forward: float
    groups: int  # that passed the filters
    tokens: int = 0  # of all responses
    loss: float = 0.0
    clip_fraction: float = 0.0
    kl: float = 0.0
    errors: int = 0  # verifier calls that raised; counted as wrong
    skipped: str = ""
    advantages: list[float] = field(default_factory=list)


def keep_group(correct: Sequence[float], tpf: Sequence[float], gap: float) -> bool:
    """False where all responses are wrong, or where they do not differ in speed."""
    return any(correct) and max(tpf) - min(tpf) >= gap


def advantages(
    groups: Sequence[tuple[Sequence[float], Sequence[float]]], *, tpf_weight: float = 1.0,
    speed_only_if_correct: bool = False, normalise: str = "decoupled",
) -> np.ndarray:
    """float64, all responses of all groups: ``groups`` are (r1, r2) of each."""
    if normalise not in ("decoupled", "sum"):
        raise OptionError("normalise", normalise, "decoupled or sum")
    rewards = []
    for r1, r2 in groups:
        right, speed = np.asarray(r1, float), np.asarray(r2, float)
        if normalise == "sum":
            rewards.append(zscore(right + tpf_weight * speed))
            continue
        if speed_only_if_correct:
            z = np.zeros_like(speed)
            z[right > 0] = zscore(speed[right > 0])
        else:
            z = zscore(speed)
        rewards.append(zscore(right) + tpf_weight * z)
    return zscore(np.concatenate(rewards)) if rewards else np.zeros(0)


def policy_loss(
    logp: Tensor, old: Tensor, ref: Tensor, advantage: Tensor, correct: Tensor, row: Tensor, s: Lightning
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, clip fraction, KL). All [k]; ``advantage`` and ``correct`` of the token's response, ``row`` its number.

    Mean of -min(rho A, clip(rho) A) over the tokens of a response, then over responses; mu times the mean -log p over
    all tokens of right responses; beta times the mean of the k3 estimate of the distance to the initial model.
    """
    gain, outside = clipped(logp, old, advantage, s.clip, s.clip_high)
    token = -gain
    count = torch.zeros(int(row.max()) + 1).index_add_(0, row, torch.ones_like(token))
    policy = (token / count[row]).sum() / (count > 0).sum()
    anchor = -(logp * correct).sum() / correct.sum().clamp(min=1)
    gap = (logp - ref).clamp(-CLAMP, CLAMP)
    kl = ((-gap).exp() - 1 + gap).mean()
    return policy + s.nll_weight * anchor + s.kl_beta * kl, outside.float().mean(), kl


def lightning(
    model: Transformer, prompts: Sequence[tuple[Sequence[int], Verifier]], settings: Lightning, *, steps: int,
    stop_ids: Sequence[int], report: Callable[[Step], None] | None = None, clock: Callable[[], bool] | None = None,
    first: int = 0, optimizer: MuonAdamW | None = None, reference: Transformer | None = None,
) -> Iterator[Step]:
    """Train ``model`` in place on prompts with verifiers of the answer's ids; yields after every step.

    Prompts are walked in order, from the front again at the end. ``clock`` false ends the run early. A run that goes
    on gives its ``first`` step, its ``optimizer`` and the ``reference``, the initial model.
    """
    if model.config.attention != "block" or model.config.mask_token_id is None:
        raise UnsupportedError(
            f"LightningRL trains block diffusion models; this one has {model.config.attention!r} attention"
        )
    s = settings
    reference = reference or copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = optimizer or MuonAdamW(model, lr=s.lr, adam_lr=s.lr, weight_decay=0.0, muon=False)
    for step in range(first, steps):
        if clock is not None and not clock():
            return
        chosen = some(prompts, step, s.prompts_per_step)
        engine = rollout_engine(model, stop_ids, seqs=s.prompts_per_step * s.group_size)
        groups = roll_out(
            engine, [p for p, _ in chosen], s.group_size, max_tokens=s.max_tokens, seed=s.seed * 1009 + step,
            threshold=s.threshold, temperature=s.temperature,
        )
        seen = Step(step, 0.0, 0.0, 0, sum(p.length for group in groups for p in group))
        kept = _judged(groups, [v for _, v in chosen], s, seen)
        if kept:
            _update(model, reference, optimizer, kept, s, seen)
        else:
            seen.skipped = "no group passed the filters: all wrong, or all of one speed"
        if report is not None:
            report(seen)
        yield seen


Judged = tuple[list[Path], list[float], list[float]]  # responses, r1, r2 of a group


def _judged(
    groups: Sequence[list[Path]], verifiers: Sequence[Verifier], s: Lightning, seen: Step
) -> list[Judged]:
    """Rewards of every group; those that pass the filters."""
    out, everything = [], []
    for paths, verify in zip(groups, verifiers, strict=True):
        correct = []
        for p in paths:
            right, raised = verdict(verify, p.tokens) if p.complete else (0.0, False)
            correct.append(right)
            seen.errors += raised
        tpf = [p.tokens_per_forward for p in paths]
        everything += zip(correct, tpf, strict=True)
        if keep_group(correct, tpf, s.tpf_gap):
            out.append((paths, correct, tpf))
    seen.accuracy, seen.tokens_per_forward = np.mean(everything, axis=0).tolist()
    seen.groups = len(out)
    return out


def _update(
    model: Transformer, reference: Transformer, optimizer: MuonAdamW, kept: list[Judged], s: Lightning,
    seen: Step,
) -> None:
    """One pass over the batch in micro batches, one update (the paper's one epoch per rollout batch)."""
    block, mask_id = model.config.block_size, model.config.mask_token_id
    assert mask_id is not None
    a = advantages(
        [(r1, r2) for _, r1, r2 in kept], tpf_weight=s.tpf_weight, speed_only_if_correct=s.speed_only_if_correct,
        normalise=s.normalise,
    )
    seen.advantages = a.tolist()
    paths = [p for group, _, _ in kept for p in group]
    correct = [r for _, r1, _ in kept for r in r1]
    order = sorted(range(len(paths)), key=lambda i: len(paths[i].ids))  # like lengths together
    parts = [order[i : i + s.micro_batch] for i in range(0, len(order), s.micro_batch)]
    for part in parts:
        rows = path_rows([paths[i] for i in part], block, mask_id, s.logp, s.shrink)
        row = rows.labels.nonzero()[:, 0]
        pick = lambda values, part=part, row=row: torch.tensor([values[i] for i in part], dtype=torch.float32)[row]
        logp = logps(PackedNet(model), rows)
        with torch.no_grad():
            ref = logps(PackedNet(reference), rows)
        loss, clipped, kl = policy_loss(logp, logp.detach(), ref, pick(a), pick(correct), row, s)
        share = len(part) / len(order)
        (loss * share).backward()
        seen.loss += float(loss.detach()) * share
        seen.clip_fraction += float(clipped) * share
        seen.kl += float(kl.detach()) * share
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(1.0)
