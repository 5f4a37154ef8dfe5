"""What a result must say about itself: version, commit, machine, threads, dtype, seed, date."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from stretto.decoding.profiles import cpu_name

__all__ = ["machine", "provenance", "write_atomically", "write_json"]


@lru_cache(maxsize=1)
def machine() -> dict[str, Any]:
    """The CPU's name, the cores this process may use, memory in GiB, the operating system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": cpu_name(), "cores": cores, "memory_gib": _memory_gib(),
        "os": f"{platform.system()} {platform.machine()}",
    }


def provenance(llm: Any = None, **facts: Any) -> dict[str, Any]:
    """Everything a reader needs to repeat a measurement; ``facts`` (seed, samples, ...) are added as they are.

    ``llm`` adds what the engine runs with: threads, dtype, backend, deterministic mode.
    """
    out: dict[str, Any] = {"version": _version(), "commit": _commit(), **machine()}
    out["python"] = platform.python_version()
    if llm is not None:
        out.update(_engine(llm))
    out["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    return {**out, **facts}


def write_atomically(path: str | Path, text: str) -> Path:
    """Write ``text`` to a temporary name beside ``path``, then rename: nothing half-written is ever seen."""
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def write_json(path: str | Path, data: Mapping[str, Any]) -> Path:
    """``write_atomically`` of ``data`` as JSON."""
    return write_atomically(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def _engine(llm: Any) -> dict[str, Any]:
    import torch

    weight = next(iter(llm.model.parameters()))
    return {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "device": weight.device.type,
        "dtype": str(weight.dtype).removeprefix("torch."), "backend": llm.runner.backend,
        "deterministic": llm.deterministic,
    }


def _version() -> str:
    import stretto

    return getattr(stretto, "__version__", "unknown")


@lru_cache(maxsize=1)
def _commit() -> str | None:
    """The commit of the checkout this package runs from, "+changes" when its files differ; None outside of one."""
    package = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *args], capture_output=True, text=True, timeout=5, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "errors.py"):
        return None
    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if git("status", "--porcelain", "--", ".") else "")


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
