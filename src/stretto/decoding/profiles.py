"""What ``tune`` found for a model on this machine, where it is kept, and what ``method="auto"`` makes of it.

Free of torch. A profile is one JSON file, named by a fingerprint of the model's files, so that a moved or renamed
checkpoint keeps its profile and a retrained one does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from stretto.decoding.registry import METHODS
from stretto.errors import CheckpointError
from stretto.zoo.models import resolve

__all__ = ["FORMAT", "AutoChoice", "cpu_name", "fingerprint", "load_profile", "profile_path", "resolve_auto"]

FORMAT = 1
_EDGE = 1 << 16  # bytes read from each end of a weight file


class AutoChoice(NamedTuple):
    """What "auto" stands for: a method, its options, and why."""

    method: str
    options: dict[str, Any]
    note: str


def resolve_auto(model: str | Path, profile: str | Path | None = None) -> AutoChoice:
    """The tuned choice for ``model``; plain decoding, with a note, where there is no usable profile.

    ``profile``: a file written by ``tune``, None = the user's own. Raises CheckpointError when ``profile`` was given
    and cannot be read.
    """
    found = load_profile(model, profile)
    if found is None:
        plain = plain_method(model)
        why = f"no profile for {model}: using {plain}; 'stretto tune {model}' measures what pays"
        return AutoChoice(plain, {}, why)
    origin = found["provenance"]
    note = f"{found['method']} by the profile of {origin['date'][:10]}: {found['speedup']:.2f} times plain decoding"
    if origin.get("cpu") != cpu_name():
        note += f" (measured on another machine: {origin.get('cpu')}; tune again to be sure)"
    return AutoChoice(found["method"], dict(found["options"]), note)


def load_profile(model: str | Path, profile: str | Path | None = None) -> dict[str, Any] | None:
    """The profile for ``model``, None when there is none or the user's own file is not usable any more."""
    path = Path(profile).expanduser() if profile else profile_path(model)
    if not path.is_file() and not profile:
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        good = data["format"] == FORMAT and data["method"] in METHODS and isinstance(data["options"], dict)
        good = good and isinstance(data["speedup"], (int, float)) and isinstance(data["provenance"]["date"], str)
    except (OSError, ValueError, KeyError, TypeError) as error:
        good, reason = False, f"{type(error).__name__}: {error}"
    else:
        reason = "its format or its method is not known to this version"
    if good and data["fingerprint"] != fingerprint(model):
        good, reason = False, f"it was written for other weights than those of {model}"
    if not good and profile:
        raise CheckpointError(f"{path} is no profile for {model}: {reason}; write one with 'stretto tune'")
    return data if good else None


def profile_path(model: str | Path) -> Path:
    """Where the user's own profile of ``model`` is kept, by the platform's convention."""
    return _config_home() / "stretto" / "profiles" / f"{fingerprint(model)}.json"


def fingerprint(model: str | Path) -> str:
    """16 hex digits of config.json, and of the name, size and both ends of every weight file."""
    folder = resolve(model)
    digest = hashlib.sha256()
    try:
        digest.update((folder / "config.json").read_bytes())
        for file in sorted(folder.glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            with file.open("rb") as handle:
                digest.update(handle.read(_EDGE))
                handle.seek(max(0, size - _EDGE))
                digest.update(handle.read(_EDGE))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read as a model: {error}") from error
    return digest.hexdigest()[:16]


def plain_method(model: str | Path) -> str:
    """Plain decoding for this model: "ar", or "diffusion" on one that has no causal attention."""
    from stretto.models.config import ModelConfig

    try:
        data = json.loads((resolve(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"config.json of {model} cannot be read: {error}") from error
    return "ar" if ModelConfig.from_hf(data).attention == "causal" else "diffusion"


def _config_home() -> Path:
    if os.environ.get("XDG_CONFIG_HOME"):
        return Path(os.environ["XDG_CONFIG_HOME"])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    return Path.home() / ".config"


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"
