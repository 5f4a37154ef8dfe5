"""The tensor files of a checkpoint directory, opened but not read: names, shapes, dtypes, one
tensor at a time.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stretto.errors import CheckpointError, WeightsError

__all__ = ["DTYPES", "INDEX", "WEIGHTS", "Store", "listed", "read_json"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
MAX_LISTED = 12


class Store:
    """The tensors of a checkpoint directory by name, whatever files they lie in. Files close with
    ``stack``.
    """

    def __init__(self, path: Path, stack: ExitStack):
        self.path = path
        self._files: dict[str, Any] = {}
        self.where: dict[str, str] = {}  # tensor -> file name
        for file in self._file_names():
            handle = self._open(file, stack)
            self._files[file] = handle
            self.where |= dict.fromkeys(handle.keys(), file)
        slices = {name: self._files[file].get_slice(name) for name, file in self.where.items()}
        self.shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
        self.kinds = {name: s.get_dtype() for name, s in slices.items()}
        self.dtypes = {name: DTYPES[k] for name, k in self.kinds.items() if k in DTYPES}

    def _file_names(self) -> list[str]:
        if (self.path / INDEX).exists():
            weight_map = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise WeightsError(f"{self.path / INDEX} holds no weight_map")
            files = sorted(set(weight_map.values()))
            missing = [f for f in files if not (self.path / f).exists()]
            if missing:
                raise WeightsError(f"{self.path} lacks {listed(missing)}, which {INDEX} names")
            return files
        if (self.path / WEIGHTS).exists():
            return [WEIGHTS]
        found = sorted(
            p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf")
        )
        hint = f"; {', '.join(found)} cannot be read: convert to safetensors" if found else ""
        raise WeightsError(f"{self.path} has neither {WEIGHTS} nor {INDEX}{hint}")

    def _open(self, file: str, stack: ExitStack) -> Any:
        try:
            return stack.enter_context(safe_open(self.path / file, framework="pt"))
        except (SafetensorError, OSError) as e:
            raise WeightsError(f"{self.path / file} cannot be read as safetensors: {e}") from e

    def get(self, name: str) -> Tensor:
        try:
            return self._files[self.where[name]].get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise WeightsError(f"tensor {name} of {self.path} cannot be read: {e}") from e


def read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise CheckpointError(f"{file.parent} has no {file.name}") from e
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file} cannot be read as JSON: {e}") from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(data).__name__}")
    return data


def listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
