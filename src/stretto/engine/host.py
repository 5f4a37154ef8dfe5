"""What the engine offers to a method: the model's facts, its measured cost, and a second model on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from stretto.engine.runner import Runner
from stretto.models.config import ModelConfig

__all__ = ["Host"]


@dataclass(slots=True)
class Host:
    """``runner`` runs the target model. ``stop_ids`` end a sequence. ``open_runner(model)`` loads another model with
    a K/V pool of its own (a draft) and checks that its vocabulary fits. ``max_model_len`` in tokens.
    ``plan``: methods may switch themselves off where the measured curve says so."""

    runner: Runner
    stop_ids: tuple[int, ...]
    max_model_len: int
    open_runner: Callable[[str], Runner]
    plan: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> ModelConfig:
        return self.runner.config
