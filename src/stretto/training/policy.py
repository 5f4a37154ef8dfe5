"""What policy optimisation of any model shares: engines on present weights, verdicts, the clipped ratio.

Legend: k tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from stretto.engine.engine import Engine
from stretto.engine.host import Host
from stretto.engine.runner import Runner
from stretto.models.transformer import Transformer

__all__ = ["CLAMP", "Verifier", "clipped", "rollout_engine", "some", "verdict", "zscore"]

CLAMP = 10.0  # of differences of log-probabilities

Verifier = Callable[[list[int]], bool]  # the ids of an answer -> whether it is right
T = TypeVar("T")


def zscore(x: np.ndarray) -> np.ndarray:
    """(x - mean) / population std; 0 where the std is 0."""
    std = x.std()
    return (x - x.mean()) / std if std > 1e-12 else np.zeros_like(x)


def clipped(logp: Tensor, old: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(min(rho A, clip(rho) A), whether rho left [1 - low, 1 + high]), all [k]; ``high`` is ``low`` where A < 0."""
    ratio = (logp - old).clamp(-CLAMP, CLAMP).exp()
    top = torch.where(advantage >= 0, 1 + high, 1 + low)
    inside = torch.minimum(ratio, top).clamp(min=1 - low)
    return torch.minimum(ratio * advantage, inside * advantage), inside != ratio


def verdict(verify: Verifier, ids: list[int]) -> tuple[float, bool]:
    """(1 if right, whether the verifier raised): it is the user's code, and whatever it raises counts as wrong."""
    try:
        return float(bool(verify(ids))), False
    except Exception:
        return 0.0, True


def some(prompts: Sequence[T], step: int, n: int) -> list[T]:
    """The ``n`` prompts of a step: walked in order, from the front again at the end."""
    return [prompts[(step * n + i) % len(prompts)] for i in range(n)]


def rollout_engine(
    model: Transformer, stop_ids: Sequence[int], *, seqs: int, backend: str = "auto", slots: int = 256,
    prefix_caching: bool = False,
) -> Engine:
    """An engine on the model's present weights; later updates need a new one (milliseconds for a small model).
    ``slots``: K/V rows for each of ``seqs`` sequences."""
    limit = min(1024, model.config.max_position_embeddings)
    runner = Runner(copy.deepcopy(model).eval(), slots=seqs * slots, backend=backend)

    host = Host(runner, tuple(stop_ids), limit, plan=False)
    return Engine(runner, host, max_rows=16 * seqs, max_seqs=seqs, prefix_caching=prefix_caching)
