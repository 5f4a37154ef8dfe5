"""LoRA adapters in PEFT's layout, both ways: W' = W + (alpha / r) B A, merged or as a parallel
path.

Legend: I in, O out, r rank; A is (r, I), B is (O, r). Tensor names on disk are
``base_model.model.<module>.lora_A.weight`` with the module names of the base checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stretto.errors import ArchitectureError, CheckpointError, UnsupportedError, WeightsError
from stretto.models.names import pieces
from stretto.models.transformer import Transformer

__all__ = [
    "LoRALinear", "add_lora", "load_lora", "merge_lora", "noted_fingerprint", "save_lora",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NOT_COVERED = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "fan_in_fan_out",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable tokens",
    "alora_invocation_tokens": "activated LoRA",
}


class LoRALinear(nn.Linear):
    """A linear with a low-rank path beside it; base weight and bias keep their names."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.scale, self.rank = base.weight, base.bias, scale, rank
        options = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, base.out_features, **options)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[n, I] -> [n, O]"""
        return F.linear(x, self.weight, self.bias) + self.lora_B(self.lora_A(x)) * self.scale

    def merged(self) -> nn.Linear:
        """The plain linear that computes the same."""
        with torch.no_grad():
            _add(self.weight, self.lora_A.weight, self.lora_B.weight, self.scale)
        out = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        out.weight, out.bias = self.weight, self.bias
        return out


def add_lora(
    model: Transformer,
    *,
    rank: int,
    alpha: float,
    targets: Iterable[str] = ("q_proj", "v_proj"),
) -> list[str]:
    """Give every linear named in ``targets`` a fresh low-rank path (B = 0) and freeze the rest;
    their names.
    """
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown or rank < 1:
        raise UnsupportedError(
            f"LoRA targets {unknown or rank}: targets are {', '.join(TARGETS)}, rank >= 1"
        )
    model.requires_grad_(False)
    names = [
        n
        for n, m in model.named_modules()
        if n.rpartition(".")[2] in set(targets) and type(m) is nn.Linear
    ]
    for name in names:
        _replace(model, name, LoRALinear(model.get_submodule(name), rank, alpha / rank))
    return names


def load_lora(model: Transformer, path: str | os.PathLike, *, merge: bool = True) -> list[str]:
    """Load a PEFT adapter into ``model``: added to the weights, or (``merge=False``) as parallel
    paths.

    Returns the names of the adapted modules, as on disk. Raises WeightsError when shapes or names
    do not fit.
    """
    path = Path(path)
    config = _config(path)
    pairs = _pairs(path)
    if model.packed:
        raise UnsupportedError("load the adapter before pack()")
    plan = _targets(model)
    problems = []
    for module, (a, b) in pairs.items():
        if module not in plan:
            problems.append(f"{module} does not exist in the model")
            continue
        parameter, index = plan[module]
        shape = tuple(model.get_parameter(parameter)[index].shape)
        if (len(b), a.shape[1]) != shape or len(a) != b.shape[1]:
            problems.append(
                f"{module}: B {tuple(b.shape)} x A {tuple(a.shape)} does not fit W {shape}"
            )
        elif not merge and index != ():
            problems.append(f"{module}: adapters of experts can only be merged")
    if problems:
        raise WeightsError(f"adapter {path} does not fit the model; " + "; ".join(problems[:12]))
    for module, (a, b) in pairs.items():
        parameter, index = plan[module]
        _apply(model, parameter, index, a, b, _scale(config, module, len(a)), merge)
    return list(pairs)


@torch.no_grad()
def merge_lora(model: Transformer) -> Transformer:
    """Fold every parallel path into its weight."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            _replace(model, name, module.merged())
    return model


def save_lora(
    model: Transformer,
    path: str | os.PathLike,
    *,
    base: str = "",
    fingerprint: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """Write the parallel paths as a PEFT adapter. ``base``: what to note as the base model's name
    or path; ``fingerprint``: of the base without the paths, checked when the adapter is loaded as a
    model; ``dtype`` None keeps the paths' own.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not found:
        raise UnsupportedError(
            "the model carries no adapter: add_lora() or load_lora(merge=False) first"
        )
    disk = {p: module for module, (p, _) in _targets(model).items()}
    tensors, ranks, alphas = {}, {}, {}
    for name, m in found.items():
        module = disk[f"{name}.weight"]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = _out(m.lora_A.weight, dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = _out(m.lora_B.weight, dtype)
        ranks[module], alphas[module] = m.rank, m.scale * m.rank
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": alpha,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
    }
    if fingerprint:
        config["base_fingerprint"] = fingerprint
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def noted_fingerprint(path: Path) -> str | None:
    """The fingerprint of the base that the adapter in ``path`` was trained on, where it was noted."""
    return _config(path).get("base_fingerprint")


def _out(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    return weight.detach().cpu().to(dtype or weight.dtype).contiguous()


def _config(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path / CONFIG} cannot be read: {e}") from e
    if data.get("peft_type") != "LORA":
        raise ArchitectureError(f"peft_type {data.get('peft_type')!r} is not supported: only LORA")
    for key, what in _NOT_COVERED.items():
        if data.get(key):
            raise ArchitectureError(f"the adapter uses {what} ({key}), which is not supported")
    if data.get("bias", "none") != "none":
        raise ArchitectureError(f"adapter bias={data['bias']!r} is not supported: only 'none'")
    return data


def _pairs(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name on disk -> (A [r, I], B [O, r])."""
    try:
        tensors = load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as e:
        raise WeightsError(f"{path / WEIGHTS} cannot be read: {e}") from e
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(
            r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", name
        )
        if not match:
            raise WeightsError(
                f"adapter tensor {name} of {path} is not a LoRA matrix of a linear layer"
            )
        if tensor.isnan().any():
            raise WeightsError(f"adapter tensor {name} of {path} contains NaN")
        found.setdefault(match[1], {})[match[2]] = tensor
    odd = [m for m, ab in found.items() if len(ab) != 2]
    if odd:
        raise WeightsError(
            f"adapter {path} has only one of lora_A and lora_B for {', '.join(odd[:12])}"
        )
    return {m: (ab["A"], ab["B"]) for m, ab in found.items()}


def _targets(model: Transformer) -> dict[str, tuple[str, tuple]]:
    """Module name on disk -> (our parameter, index in it), of every matrix."""
    out = {}
    for name, p in model.named_parameters():
        if p.dim() < 2 or ".lora_" in name or "embed_tokens" in name:
            continue
        for piece in pieces(name, model.config):
            if piece.part is None:
                out[piece.name.removesuffix(".weight")] = (name, piece.index)
    return out


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@torch.no_grad()
def _apply(
    model: Transformer,
    parameter: str,
    index: tuple,
    a: Tensor,
    b: Tensor,
    scale: float,
    merge: bool,
) -> None:
    if merge:
        _add(model.get_parameter(parameter)[index], a, b, scale)
        return
    name = parameter.removesuffix(".weight")
    layer = LoRALinear(model.get_submodule(name), len(a), scale)
    layer.lora_A.weight.copy_(a)
    layer.lora_B.weight.copy_(b)
    _replace(model, name, layer)


def _add(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """weight += scale B A, the sum in float32 (or wider)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = b.to(weight.device, wide) @ a.to(weight.device, wide) * scale
    weight.copy_((weight.to(wide) + delta).to(weight.dtype))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
