"""Hidden transfer: pseudo hidden states of future tokens enter in mid-stack, and the layers above refine them.

Behind layer l_i the state of a row at position p, times a trained matrix W_i, becomes a row of its own at position
p + i: step i's pseudo state. It sees the row's path and the pseudo rows of earlier steps, and its law estimates the
token at p + i + 1. No text row sees it, its keys and values never stay, and it costs the layers above l_i only. Every
node of the draft tree may carry some; those of the last accepted node build the next tree. (arXiv 2404.12022; FIRP,
2410.20488.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from stretto.decoding.ar import require_causal
from stretto.decoding.options import option
from stretto.decoding.slotted import Slotted, State
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.models.entries import Entries, Entry, check_layers

__all__ = ["HiddenTransfer", "Options"]

HEAD = 1.0  # what the head costs a row, in layers


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hidden transfer (Wu et al., 2024)."""

    adapter: str = option("auto", "the trained matrices: auto, zoo:NAME or a folder")
    tree_budget: int = option(0, "rows of a step: nodes and pseudo states (0 = as many as pay here)", low=0, high=256)


class HiddenTransfer:
    """Pseudo states from a middle layer guess ahead: better than heads on the last state, less than rows from below."""

    name = "hidden_transfer"
    lossless = True
    aliases = ("firp",)
    kinds = ("causal",)

    def __init__(self, host: Host, options: Options):
        self._host = host
        adapter = host.open_adapter("hidden_transfer", options.adapter)
        layers, self._entries = host.config.num_hidden_layers, list(adapter.config["entries"])
        chain = bool(adapter.config.get("chain"))
        check_layers(self._entries, layers, chain)
        weights = list(adapter.tensors["layers.weight"])  # k of [H, H]
        if chain:  # the state of slot i is W_i ... W_1 times the real one
            for i in range(1, len(weights)):
                weights[i] = weights[i] @ weights[i - 1]
        self._matrices = [host.runner.matrix(w) for w in weights]
        cost = [(layers - at + HEAD) / (layers + HEAD) for at in self._entries]
        self.slotted = Slotted(
            host, k=len(weights), statistics=adapter.statistics, fill=self._fill, slot_rows=cost,
            budget=options.tree_budget,
        )

    def _fill(self, slot: np.ndarray, member: np.ndarray, node: np.ndarray, first: int) -> dict[str, Any]:
        entries = []
        for i in range(int(slot.max()) + 1):
            at = np.flatnonzero(slot == i)
            rows, sources = (x.astype(np.int32) for x in (first + at, node[at]))
            entries.append(Entry(self._entries[i], self._matrices[i], rows, sources))
        return {"entries": Entries(entries)}

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
