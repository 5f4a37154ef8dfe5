"""Parallel prompt decoding (PPD): trained prompt tokens guess the next tokens inside the target's own forward.

k vectors t_1..t_k of the embedding width, trained on the frozen model, stand for unknown tokens: t_i behind a node at
position p sits at p + i, sees the node's path and t_1..t_(i-1), and its law estimates the token at p + i + 1. Every
node of the draft tree may carry some, and those of the last accepted node build the next tree. Their keys and values
never stay. (arXiv 2405.18628.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stretto.decoding.ar import require_causal
from stretto.decoding.options import option
from stretto.decoding.slotted import Slotted, State
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.models.adapter import Adapter

__all__ = ["PPD", "Options", "prompt_slots"]


def prompt_slots(host: Host, adapter: Adapter, budget: int = 0) -> Slotted:
    """The prompt tokens of ``adapter`` as slots on the model of ``host``."""
    vectors = adapter.tensors["vectors"].to(host.runner.model.device)  # [k, members, H]

    def fill(slot: np.ndarray, member: np.ndarray, node: np.ndarray, first: int) -> dict[str, Any]:
        chosen = vectors[torch.from_numpy(slot), torch.from_numpy(member)]
        return {"embeds": chosen, "embed_rows": range(first, first + len(slot))}

    k, members = vectors.shape[:2]
    return Slotted(
        host, k=k, members=members, mask=adapter.config["mask"], statistics=adapter.statistics, fill=fill,
        slot_rows=[1.0] * k, budget=budget,
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """Parallel prompt decoding (Chen et al., 2024)."""

    adapter: str = option("auto", "the trained prompt tokens: auto, zoo:NAME or a folder")
    tree_budget: int = option(0, "rows of a step: nodes and prompt tokens (0 = as many as pay here)", low=0, high=256)


class PPD:
    """A few trained vectors guess ahead in the model's own forward: the smallest of all drafters."""

    name = "ppd"
    lossless = True
    aliases = ("prompt_tokens", "parallel_prompt_decoding")
    kinds = ("causal",)

    def __init__(self, host: Host, options: Options):
        self._host = host
        adapter = host.open_adapter("ppd", options.adapter)
        self.slotted = prompt_slots(host, adapter, options.tree_budget)

    def admit(self, seq: Sequence) -> None:
        require_causal(self._host, self.name)
        seq.state = State(self.slotted.planner.pace())

    def prefill(self, seq: Sequence) -> int:
        return len(seq.tokens) - 1

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        return self.slotted.propose(seqs)

    def commit(self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]) -> list[Commit]:
        return self.slotted.commit(seqs, steps, outcomes)

    def release(self, seq: Sequence) -> None:
        seq.state = None

    def preemptible(self, seq: Sequence) -> bool:
        return True
