"""The index: one short file per published system, with its paper, its claims, its parts and its evidence.

A file ``name_of_slug.py`` defines ``SYSTEM``; adding a file is the whole registration."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from stretto.errors import UnknownNameError
from stretto.systems.types import System, evidence_folder

__all__ = ["all_systems", "evidence_folder", "get", "write_evidence"]


@lru_cache(maxsize=1)
def all_systems() -> tuple[System, ...]:
    """Every system, by slug."""
    found = []
    for info in pkgutil.iter_modules(__path__):
        if info.name != "types":
            found.append(importlib.import_module(f"{__name__}.{info.name}").SYSTEM)
    return tuple(sorted(found, key=lambda s: s.slug))


def get(slug: str) -> System:
    """By slug; UnknownNameError names the nearest."""
    for system in all_systems():
        if system.slug == slug:
            return system
    raise UnknownNameError("system", slug, [s.slug for s in all_systems()])


def write_evidence(result: Mapping[str, Any], folder: Path) -> Path:
    """``folder``/SLUG.json, in one go, with what is needed to judge it: version, commit, machine, threads, date."""
    from stretto.bench.provenance import provenance, write_json

    torch = sys.modules.get("torch")
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads()} if torch else {}
    data = {**result, "provenance": provenance(**facts)}
    return write_json(folder / f"{result['system']}.json", data)
