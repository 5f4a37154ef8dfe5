"""The models that ship: name -> folder. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stretto.errors import CheckpointError, UnknownNameError, UnsupportedError

__all__ = [
    "MODELS", "PARTS", "TOKENIZER", "ZooModel", "ZooPart", "available", "base_folder", "part_folder", "resolve",
    "training_record",
]

_HERE = Path(__file__).parent
TOKENIZER = _HERE / "tokenizer"
PREFIX = "zoo:"
ADAPTER = "adapter_config.json"  # of PEFT: a folder with it and no config.json is a LoRA adapter


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
    ZooModel("tiny-jacobi", "autoregressive, distilled by Jacobi Forcing", "fixes several tokens a forward by itself"),
    ZooModel("tiny-tools", "autoregressive, with a stream for each field of a call", "calls functions in few forwards"),
    ZooModel("tiny-hogwild", "autoregressive, on a cache that others write", "works with others on one problem"),
    ZooModel("tiny-agents", "autoregressive, for tasks of several parts", "does one agent's part, leads, merges"),
    ZooModel("tiny-steps", "autoregressive", "solves word problems of many steps", draft="tiny-steps-draft"),
    ZooModel("tiny-steps-draft", "autoregressive", "the cheap half of tiny-steps, right less often"),
    ZooModel("tiny-multiverse", "autoregressive, writes parallel blocks", "reasons on several paths at the same time"),
    ZooModel("tiny-threads", "autoregressive, writes threads of reasoning", "reasons in threads (ThreadWeaver)"),
    ZooModel("tiny-blocks-moe", "masked diffusion, block-causal, mixture of experts", "shares experts in a block"),
    ZooModel("tiny-lightningrl", "masked diffusion, block-causal (kind B)", "right in few forwards, by its rewards"),
    ZooModel("tiny-wedlm", "autoregressive and masked recovery, causal", "fills a window of masks in any order"),
    ZooModel("tiny-moe", "autoregressive, mixture of experts", "experts, placement, offload", draft="tiny-draft"),
)
MODELS: dict[str, ZooModel] = {m.name: m for m in _ALL}


@dataclass(frozen=True, slots=True)
class ZooPart:
    """An extra part trained on a frozen model of the zoo (``models/adapter.py``). ``base``: that model's name;
    ``kind``: what a method asks for; "lora": an adapter in PEFT's layout, which loads like a model."""

    name: str
    kind: str
    base: str
    purpose: str

    @property
    def folder(self) -> Path:
        return _HERE / self.name


_PARTS = (
    ZooPart("tiny-medusa", "medusa", "tiny", "Medusa heads"),
    ZooPart("tiny-ppd", "ppd", "tiny", "prompt tokens"),
    ZooPart("tiny-draft-ppd", "ppd", "tiny-draft", "prompt tokens"),
    ZooPart("tiny-hidden-transfer", "hidden_transfer", "tiny", "transfer matrices"),
    ZooPart("tiny-dparallel", "lora", "tiny-blocks", "certain about many tokens at once (dParallel)"),
    ZooPart("tiny-cd4lm", "lora", "tiny-blocks", "safe on long jumps (CD4LM)"),
    ZooPart("tiny-own-sft", "lora", "tiny-blocks", "plain fine-tuning on own answers, the control of both"),
    ZooPart("tiny-blocks-filter", "learn2pd", "tiny-blocks", "which predictions are final (Learn2PD)"),
    ZooPart("tiny-diffusion-filter", "learn2pd", "tiny-diffusion", "which predictions are final (Learn2PD)"),
    ZooPart("tiny-clover", "clover", "tiny", "Clover's chain of heads"),
    ZooPart("tiny-clover2", "clover2", "tiny", "Clover-2's chain of heads"),
    ZooPart("tiny-eagle", "eagle", "tiny", "an EAGLE layer on the last features"),
    ZooPart("tiny-eagle3", "eagle3", "tiny", "an EAGLE-3 layer on features of three depths"),
)
PARTS: dict[str, ZooPart] = {p.name: p for p in _PARTS}


def resolve(model: str | Path) -> Path:
    """The directory of "zoo:NAME", of a path, or of a hub id ("owner/name", fetched by huggingface-hub).

    Raises UnknownNameError for a zoo name that does not exist, CheckpointError for anything that is not there.
    """
    name = str(model)
    if name.startswith(PREFIX):
        return _zoo(name.removeprefix(PREFIX))
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{name} is a file: give the directory that holds config.json")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _fetch(name)
    raise CheckpointError(
        f"there is no model {name!r}: give a directory in Hugging Face layout, a hub id (owner/name), or one of "
        f"{', '.join(PREFIX + n for n in MODELS)}"
    )


def base_folder(folder: Path) -> Path:
    """The model that a folder with a LoRA adapter belongs to; the folder itself where it holds a whole model."""
    about = folder / ADAPTER
    if (folder / "config.json").exists() or not about.exists():
        return folder
    try:
        base = json.loads(about.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{about} cannot be read: {e}") from e
    if not base:
        raise CheckpointError(f"{about} names no base_model_name_or_path: load the base, then load_lora()")
    return resolve(base)


def part_folder(name: str) -> Path:
    """The folder of the part ``name`` of the zoo. Raises UnknownNameError, or CheckpointError when it is not there."""
    if name not in PARTS:
        raise UnknownNameError("adapter of the zoo", PREFIX + name, [PREFIX + p for p in PARTS])
    folder = PARTS[name].folder
    if not (folder / "adapter.json").exists():
        raise CheckpointError(f"{PREFIX}{name} is not in {folder}: make it with 'stretto train {name}'")
    return folder


def _zoo(name: str) -> Path:
    if name in PARTS and PARTS[name].kind == "lora":
        if not (PARTS[name].folder / ADAPTER).exists():
            raise CheckpointError(f"{PREFIX}{name} is not there: make it with 'stretto train {name}'")
        return PARTS[name].folder
    if name in PARTS:
        part = PARTS[name]
        raise UnsupportedError(
            f"{PREFIX}{name} is a part of {PREFIX}{part.base}, not a model: load {PREFIX}{part.base} and decode with "
            f"a method that takes a {part.kind!r} adapter (adapter={PREFIX}{name})"
        )
    if name not in MODELS:
        raise UnknownNameError("zoo model", PREFIX + name, [PREFIX + m for m in MODELS])
    model = MODELS[name]
    if not (model.folder / "config.json").exists():
        raise CheckpointError(
            f"{PREFIX}{name} ships without weights: 'stretto train {model.recipe} --out DIR' makes them"
        )
    return model.folder


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
    except Exception as e:  # the library raises many kinds; the reason is what counts
        raise CheckpointError(f"{name} could not be fetched from the hub: {e}") from e


def available() -> list[str]:
    """The names whose weights are there."""
    return [name for name, model in MODELS.items() if (model.folder / "config.json").exists()]


def training_record(name: str) -> dict[str, Any]:
    """``training.json`` of a model: recipe, steps, tokens, minutes, loss, machine, date."""
    return json.loads((_zoo(name.removeprefix(PREFIX)) / "training.json").read_text())
