"""The models that ship: name -> folder. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stretto.errors import CheckpointError, UnknownNameError

__all__ = ["MODELS", "TOKENIZER", "ZooModel", "available", "resolve", "training_record"]

_HERE = Path(__file__).parent
TOKENIZER = _HERE / "tokenizer"
PREFIX = "zoo:"


@dataclass(frozen=True, slots=True)
class ZooModel:
    """``kind``: how it generates; ``draft``: the name of the model that drafts for it."""

    name: str
    kind: str
    purpose: str
    draft: str | None = None

    @property
    def folder(self) -> Path:
        return _HERE / self.name

    @property
    def recipe(self) -> str:
        return f"zoo-{self.name}"


_ALL = (
    ZooModel("tiny", "autoregressive", "the target of every lossless method", draft="tiny-draft"),
    ZooModel("tiny-draft", "autoregressive", "drafts for tiny"),
    ZooModel("tiny-diffusion", "masked diffusion, full attention (kind F)", "decodes in any order"),
    ZooModel("tiny-blocks", "masked diffusion, block-causal (kind B)", "decodes block after block, exact cache"),
    ZooModel("tiny-moe", "autoregressive, mixture of experts", "experts, placement, offload", draft="tiny-draft"),
)
MODELS: dict[str, ZooModel] = {m.name: m for m in _ALL}


def resolve(name: str) -> Path:
    """The folder of ``zoo:NAME`` (the prefix may be left out).

    Raises UnknownNameError for another name, CheckpointError when its weights are not there.
    """
    bare = name.removeprefix(PREFIX)
    if bare not in MODELS:
        raise UnknownNameError("zoo model", name, [PREFIX + m for m in MODELS])
    model = MODELS[bare]
    if not (model.folder / "config.json").exists():
        raise CheckpointError(
            f"{PREFIX}{bare} has no weights in {model.folder}: make them with `stretto train {model.recipe}`"
        )
    return model.folder


def available() -> list[str]:
    """The names whose weights are there."""
    return [name for name, model in MODELS.items() if (model.folder / "config.json").exists()]


def training_record(name: str) -> dict[str, Any]:
    """``training.json`` of a model: recipe, steps, tokens, minutes, loss, machine, date."""
    return json.loads((resolve(name) / "training.json").read_text())
