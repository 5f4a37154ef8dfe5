"""Rows without an output: what a session evaluates to have it cached, or to know its law."""

from __future__ import annotations

import torch

from stretto.engine.types import Commit, Outcome, Sequence, Step

__all__ = ["Feed"]


class Feed:
    """Evaluates what is not cached of a thread and generates nothing; with ``logits``, those of the last rows."""

    name, lossless = "feed", True

    def __init__(self, wanted: int = 0):
        self.wanted = wanted  # rows from the end whose logits are kept
        self.logits = torch.empty(0)

    def admit(self, seq: Sequence) -> None:
        pass

    def prefill(self, seq: Sequence) -> int:
        return len(seq.tokens) - max(1, self.wanted)

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        n = max(1, self.wanted)
        return [Step(s.tokens[len(s.tokens) - n :], logits=range(n if self.wanted else 0)) for s in seqs]

    def commit(self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]) -> list[Commit]:
        if self.wanted:
            self.logits = outcomes[0].logits.clone()
        return [Commit(keep=range(len(step)), finished="stop") for step in steps]

    def release(self, seq: Sequence) -> None:
        pass

    def preemptible(self, seq: Sequence) -> bool:
        return False
