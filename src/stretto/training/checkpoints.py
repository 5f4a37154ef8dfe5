"""Training checkpoints: weights, optimizer tensors, averaged weights and counters, written whole or not at all.

Tensors go to safetensors files and numbers to JSON: nothing is pickled. A checkpoint is a folder that appears by a
rename; the newest complete one is found by its name.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["latest", "read", "write"]

_PREFIX = "step-"


def write(
    folder: Path, step: int, groups: dict[str, dict[str, Tensor]], state: dict[str, Any], *, keep: int = 1,
) -> Path:
    """Write ``folder/step-<step>`` with one safetensors file per group; older ones beyond ``keep`` are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"{_PREFIX}{step:08d}", folder / f".partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, tensors in groups.items():
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial / f"{name}.safetensors")
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None."""
    found = _all(folder)
    return found[-1] if found else None


def read(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups and the state that :func:`write` was given."""
    groups = {f.stem: load_file(f) for f in sorted(checkpoint.glob("*.safetensors"))}
    return groups, json.loads((checkpoint / "state.json").read_text())


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*"))
