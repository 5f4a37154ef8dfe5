"""The filter of Learn2PD: from the confidences of a block, which predictions are already final.

Two linear layers with a ReLU between them, R^B -> R^hidden -> R^B, then a sigmoid: B confidences in order, 1.0 where a
position is decided or lies outside the text; out comes the probability that each prediction equals the final token.
Legend: B positions of a block, F inputs per position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stretto.decoding.unmask import Candidates
from stretto.errors import WeightsError
from stretto.models.adapter import Adapter

__all__ = ["KIND", "Filter", "block_inputs"]

KIND = "learn2pd"
NEUTRAL = {"confidence": 1.0, "odds": 1.0, "margin": 1.0, "entropy": 0.0}  # of a position that is decided
SURE = 16.0  # log-odds that count as certain


def block_inputs(
    names: Sequence[str], c: Candidates, positions: Sequence[int], start: int, block: int
) -> np.ndarray:
    """float32 [F * B]: what the filter sees of a window that begins at ``start``; ``c`` are the candidates of its
    masked ``positions``."""
    out = np.repeat(np.array([[NEUTRAL[n]] for n in names], np.float32), block, 1)
    at = np.asarray(positions) - start
    for row, name in zip(out, names, strict=True):
        row[at] = _odds(c.confidence) if name == "odds" else getattr(c, name)
    return out.ravel()


def _odds(p: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)), in units of ``SURE``, within -1..1: tells 0.999 from 0.99999, which p itself hardly does."""
    p = np.clip(p, 1e-7, 1 - 1e-7)
    return np.clip(np.log(p / (1 - p)) / SURE, -1.0, 1.0)


class Filter:
    """A trained filter. ``block``: B; ``threshold``: the probability from which it was found safe enough."""

    def __init__(self, adapter: Adapter):
        config, t = adapter.config, {n: x.numpy() for n, x in adapter.tensors.items()}
        self.block, self.threshold = int(config["block"]), float(config["threshold"])
        self.inputs = tuple(config["inputs"])
        hidden = int(config["hidden"])
        shapes = {
            "first.weight": (hidden, self.block * len(self.inputs)), "first.bias": (hidden,),
            "second.weight": (self.block, hidden), "second.bias": (self.block,),
        }
        if {n: x.shape for n, x in t.items()} != shapes:
            raise WeightsError(f"the filter {adapter.source} does not have the shapes of its configuration: {shapes}")
        self._t = t

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """float32 [F * B] -> [B]: a function of this window alone."""
        h = np.maximum(self._t["first.weight"] @ x + self._t["first.bias"], 0.0)
        return 1 / (1 + np.exp(-(self._t["second.weight"] @ h + self._t["second.bias"])))

    def final(self, c: Candidates, positions: Sequence[int], start: int) -> np.ndarray:
        """[n]: the probability that the candidate of each masked position is final."""
        probability = self(block_inputs(self.inputs, c, positions, start, self.block))
        return probability[np.asarray(positions) - start]
