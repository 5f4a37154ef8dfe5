"""What the engine offers to a method: the model's facts, its measured cost, and a second model on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from stretto.engine.runner import Runner
from stretto.errors import UnsupportedError
from stretto.models.adapter import AUTO, Adapter, open_adapter
from stretto.models.config import ModelConfig

__all__ = ["Host"]


def _alone(name: str) -> Runner:
    raise UnsupportedError(f"{name!r} cannot be opened: this engine runs one model (LLM can open a second one)")


@dataclass(slots=True)
class Host:
    """``runner`` runs the target model. ``stop_ids`` end a sequence. ``open_runner(model)`` loads another model with
    a K/V pool of its own (a draft) and checks that its vocabulary fits; by default there is none. ``max_model_len`` in
    tokens.
    ``taps``: layers whose states are kept for every sequence, beside the method's own (somebody records them).
    ``plan``: methods may switch themselves off where the measured curve says so. ``parts(kind, name)``: where trained
    parts come from, instead of the zoo and the disk."""

    runner: Runner
    stop_ids: tuple[int, ...]
    max_model_len: int
    open_runner: Callable[[str], Runner] = _alone
    plan: bool = True
    taps: tuple[int, ...] = ()
    parts: Callable[[str, str], Adapter] | None = None
    notes: list[str] = field(default_factory=list)

    def open_adapter(self, kind: str, name: str = AUTO) -> Adapter:
        """The trained part of ``kind`` for the target: "auto" = the one that ships for it, "zoo:NAME", or a folder.

        Raises UnsupportedError where there is none, or where it belongs to another base (both sides are named).
        """
        if self.parts is not None:
            return self.parts(kind, name).check(self.runner.model, kind)
        return open_adapter(kind, name, self.runner.model)

    def states(self, layer: int) -> Tensor:
        """float32 [S, H]: the states after ``layer`` of the rows that ``Method.taps`` asks to keep, by slot."""
        return self.runner.keep(layer)

    @property
    def written(self) -> np.ndarray:
        """int64 [S]: the number of the forward that wrote each slot's states, or below 0 of the move that did; 0 = it
        has none. It changes whenever a slot gets another row."""
        return self.runner.written

    @property
    def config(self) -> ModelConfig:
        return self.runner.config
