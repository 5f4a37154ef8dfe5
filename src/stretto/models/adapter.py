"""Adapters: one file format for every extra part that was trained on a frozen model.

Medusa heads, EAGLE layers, prompt tokens, transfer matrices, filters: a folder with ``adapter.safetensors`` (bfloat16
unless told otherwise) and ``adapter.json``, which names the kind of part, the base it belongs to, the part's own
configuration and what was measured after training. The base is known by its fingerprint, not by its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as render_tensors
from torch import Tensor, nn

from stretto.errors import CheckpointError, UnknownNameError, UnsupportedError, WeightsError
from stretto.models.linear import InferenceLinear
from stretto.models.transformer import Transformer
from stretto.zoo.models import PARTS, PREFIX, part_folder

__all__ = ["AUTO", "Adapter", "Base", "fingerprint", "load_adapter", "open_adapter", "save_adapter"]

CONFIG, WEIGHTS = "adapter.json", "adapter.safetensors"
FORMAT = 1
AUTO = "auto"  # the part of the wanted kind that ships for the model at hand
SAMPLE = 4096  # values of each tensor that enter the fingerprint


@dataclass(frozen=True, slots=True)
class Base:
    """The model that a part was trained on."""

    name: str
    fingerprint: str
    hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, model: Transformer, name: str = "") -> Base:
        return cls(name, fingerprint(model), model.config.hidden_size, model.config.vocab_size)

    def __str__(self) -> str:
        name = f"{self.name} " if self.name else ""
        return f"{name}(hash {self.fingerprint}, width {self.hidden_size}, vocabulary {self.vocab_size})"


@dataclass(frozen=True, slots=True)
class Adapter:
    """One trained part. ``tensors`` by name, float32; ``config``: what its code needs to build it;
    ``statistics``: what was measured, e.g. ``acceptance[d][r]``; ``source``: where it came from."""

    kind: str
    base: Base
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    source: str = "memory"

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.tensors.values())

    def check(self, model: Transformer, kind: str) -> Adapter:
        """Itself, or UnsupportedError when it is another kind of part or belongs to another base."""
        if self.kind != kind:
            raise UnsupportedError(
                f"the adapter {self.source} is of kind {self.kind!r}, the method wants {kind!r}: give one of that "
                f"kind, or 'auto'"
            )
        here = Base.of(model)
        mine, theirs = self.base, here
        if (mine.fingerprint, mine.hidden_size, mine.vocab_size) != (
            theirs.fingerprint, theirs.hidden_size, theirs.vocab_size
        ):
            raise UnsupportedError(
                f"the adapter {self.source} was trained on {mine}; this model is {theirs}: train it on this model "
                f"(stretto train ... --base), or load the model that it belongs to"
            )
        return self

    def into(self, module: nn.Module) -> nn.Module:
        """Fill ``module`` (strictly: WeightsError names what is missing, unexpected or misshapen)."""
        wanted = {n: tuple(p.shape) for n, p in module.state_dict().items()}
        given = {n: tuple(t.shape) for n, t in self.tensors.items()}
        wrong = [
            f"{n}: the part needs {wanted.get(n, 'no such tensor')}, the file has {given.get(n, 'none')}"
            for n in sorted({*wanted, *given}) if wanted.get(n) != given.get(n)
        ]
        if wrong:
            raise WeightsError(f"the adapter {self.source} does not fit its configuration: {'; '.join(wrong[:6])}")
        module.load_state_dict(self.tensors)
        return module


def fingerprint(model: Transformer) -> str:
    """16 hexadecimal digits over the shape of ``model`` and a fixed sample of every weight, rounded to bfloat16.

    It is the same whatever dtype the checkpoint was loaded in, and after ``pack()``.
    """
    c = model.config
    facts = (
        c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads,
        c.head_dim, c.vocab_size, c.rope.type, float(c.rope.theta), float(c.rms_norm_eps), c.attention,
    )
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8)
    for name, tensor in sorted(_weights(model)):
        flat = tensor.detach().reshape(-1)
        stride = max(1, len(flat) // SAMPLE)
        values = flat[::stride][:SAMPLE].to("cpu", torch.float32).to(torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def _weights(model: Transformer) -> list[tuple[str, Tensor]]:
    """(name, weight) of every matrix and norm, those of fused linears apart; biases and experts aside."""
    out = []
    for name, module in model.named_modules():
        if isinstance(module, InferenceLinear):
            owner, _, leaf = name.rpartition(".")
            if leaf == "_packed_head":
                if not model.config.tie_word_embeddings:
                    out.append(("lm_head", module.plain()[0]))
                continue
            if leaf.startswith("packed_"):
                continue  # a second form of a weight that is there too
            names = FUSED.get(leaf, (leaf,))
            out += [(f"{owner}.{n}", w) for n, w in zip(names, module.plain(), strict=True)]
        elif isinstance(weight := getattr(module, "weight", None), Tensor):
            out.append((name, weight))
    return out


def save_adapter(path: str | os.PathLike, adapter: Adapter, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the folder ``path``; each file appears whole, and the description names the weights it belongs to."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    data = render_tensors({n: t.detach().cpu().to(dtype).contiguous() for n, t in adapter.tensors.items()})
    about = {
        "format": FORMAT, "kind": adapter.kind,
        "base": {
            "name": adapter.base.name, "fingerprint": adapter.base.fingerprint,
            "hidden_size": adapter.base.hidden_size, "vocab_size": adapter.base.vocab_size,
        },
        "config": adapter.config, "parameters": adapter.parameters, "statistics": adapter.statistics,
        "weights": _hash(data),
    }
    _write(folder / WEIGHTS, data)
    _write(folder / CONFIG, (json.dumps(about, indent=1) + "\n").encode())


def load_adapter(path: str | os.PathLike) -> Adapter:
    """Read the folder ``path``. Raises CheckpointError or WeightsError for files that are missing or damaged."""
    folder = Path(path)
    about = _describe(folder)
    try:
        data = (folder / WEIGHTS).read_bytes()
    except OSError as e:
        raise WeightsError(f"the adapter {folder} has no {WEIGHTS} that can be read: {e}") from e
    if _hash(data) != about["weights"]:
        raise WeightsError(
            f"{folder / WEIGHTS} (hash {_hash(data)}) is not what {CONFIG} describes (hash {about['weights']}): "
            f"it is damaged, or the files come from two adapters"
        )
    try:
        tensors = {n: t.float() for n, t in parse_tensors(data).items()}
    except SafetensorError as e:
        raise WeightsError(f"{folder / WEIGHTS} cannot be read: {e}") from e
    bad = [n for n, t in tensors.items() if not t.isfinite().all()]
    if bad:
        raise WeightsError(f"{folder / WEIGHTS}: tensor {bad[0]} holds NaN or infinity")
    return Adapter(
        about["kind"], Base(**about["base"]), tensors, about["config"], about.get("statistics", {}), str(folder)
    )


def open_adapter(kind: str, name: str, model: Transformer) -> Adapter:
    """The part of ``kind`` called ``name`` for ``model``: "auto", "zoo:NAME", or a folder.

    "auto" is the part of that kind in the zoo whose base is ``model``. Raises UnsupportedError where there is none,
    or where the part is of another kind or belongs to another base.
    """
    if name == AUTO:
        name = PREFIX + _shipped(kind, model)
    folder = part_folder(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else Path(name).expanduser()
    return load_adapter(folder).check(model, kind)


def _shipped(kind: str, model: Transformer) -> str:
    """The zoo's part of ``kind`` for ``model``."""
    parts = [p for p in PARTS.values() if p.kind == kind]
    if not parts:
        raise UnknownNameError("kind of adapter in the zoo", kind, {p.kind for p in PARTS.values()})
    here, seen = Base.of(model), []
    for part in parts:
        if not (part.folder / CONFIG).exists():
            seen.append(f"{PREFIX}{part.name}: not there, make it with 'stretto train {part.name}'")
            continue
        base = Base(**_describe(part.folder)["base"])
        if base.fingerprint == here.fingerprint:
            return part.name
        seen.append(f"{PREFIX}{part.name}: for {base}")
    raise UnsupportedError(
        f"no adapter of kind {kind!r} ships for this model {here} ({'; '.join(seen)}): train one on it "
        f"(stretto train {parts[0].name} --base MODEL --out DIR) and give adapter=DIR"
    )


def _describe(folder: Path) -> dict[str, Any]:
    """``adapter.json``, checked for the keys that must be there."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no adapter {folder}: give a folder with {CONFIG} and {WEIGHTS}, or 'auto'")
    try:
        about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"the adapter {folder} has no {CONFIG} that can be read: {e}") from e
    keys = {"format": int, "kind": str, "base": dict, "config": dict, "weights": str}
    wrong = [k for k, t in keys.items() if not isinstance(about, Mapping) or not isinstance(about.get(k), t)]
    if wrong or set(about["base"]) != {"name", "fingerprint", "hidden_size", "vocab_size"}:
        raise CheckpointError(f"{folder / CONFIG} does not describe an adapter: wrong or missing {wrong or ['base']}")
    if about["format"] != FORMAT:
        raise CheckpointError(f"{folder / CONFIG} has format {about['format']}, this version reads {FORMAT}")
    return about


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".partial-", delete=False) as f:
        f.write(data)
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)
