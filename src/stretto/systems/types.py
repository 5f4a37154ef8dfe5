"""What the index says of one published system."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from stretto.errors import UnsupportedError

__all__ = ["Claim", "System"]

EVIDENCE = Path(__file__).parents[3] / "evidence"


@dataclass(frozen=True, slots=True)
class Claim:
    """``paper``: the published figure in its own setting. ``bar``: what must be measured at our scale, if decided."""

    name: str
    paper: str
    bar: str = ""


@dataclass(frozen=True, slots=True)
class System:
    """One published system. ``room``: where its part lives or will live; ``parts``: the modules here that it is made
    of; ``evidence(quick)`` measures its claims and returns rows
    {"name", "paper", "measured", "baseline", "bar", "holds", "note"}."""

    slug: str
    title: str
    room: str
    purpose: str
    paper: str
    claims: tuple[Claim, ...]
    parts: tuple[str, ...] = ()
    command: str = ""
    evidence: Callable[[bool], list[dict[str, Any]]] | None = field(default=None, compare=False)

    @property
    def state(self) -> str:
        """missing: no part is here; works: measured, and every claim holds; partial: anything between."""
        if not self.parts:
            return "missing"
        found = _recorded(self.slug)
        return "works" if found and found.get("holds") else "partial"

    def row(self) -> dict[str, Any]:
        """The line of ``stretto systems``."""
        found = _recorded(self.slug)
        return {
            "slug": self.slug, "title": self.title, "purpose": self.purpose, "paper": self.paper,
            "room": self.room, "state": self.state, "command": self.command or None,
            "evidence": f"evidence/{self.slug}.json" if found else None,
        }

    def measure(self, quick: bool) -> dict[str, Any]:
        """Run the evidence. Raises UnsupportedError while there is none."""
        if self.evidence is None:
            raise UnsupportedError(
                f"{self.slug} is not built yet: 'stretto systems' lists what is; nothing was measured"
            )
        claims = self.evidence(quick)
        return {"system": self.slug, "holds": all(c["holds"] for c in claims), "quick": quick, "claims": claims}


@lru_cache(maxsize=128)
def _recorded(slug: str) -> dict[str, Any] | None:
    try:
        return json.loads((EVIDENCE / f"{slug}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
