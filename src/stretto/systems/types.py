"""What the index says of one published system."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stretto.errors import UnsupportedError

__all__ = ["ROW", "Claim", "System", "evidence_folder"]

ROW = ("name", "paper", "measured", "baseline", "bar", "holds", "note")  # keys of a measured claim


@dataclass(frozen=True, slots=True)
class Claim:
    """``paper``: the published figure. ``bar``: what must be measured at our scale, if decided."""

    name: str
    paper: str
    bar: str = ""


@dataclass(frozen=True, slots=True)
class System:
    """One published system. ``room``: where its part lives or will live; ``parts``: the modules here
    that it is made of; ``command``: what a user types.

    ``evidence(quick)`` measures the claims next to their baselines and returns {"claims": [...]} with
    the keys of ``ROW`` in each, and whatever else a reader needs: seeds, dtype, spread.
    """

    slug: str
    title: str
    room: str
    purpose: str
    paper: str
    claims: tuple[Claim, ...]
    parts: tuple[str, ...] = ()
    command: str = ""
    evidence: Callable[[bool], Mapping[str, Any]] | None = field(default=None, compare=False)

    @property
    def state(self) -> str:
        """missing: no part is here; works: measured, and every claim holds; partial: anything between."""
        if not self.parts:
            return "missing"
        found = _recorded(self.slug)
        return "works" if found and found.get("holds") is True else "partial"

    def row(self) -> dict[str, Any]:
        """The line of ``stretto systems``."""
        return {
            "slug": self.slug,
            "title": self.title,
            "purpose": self.purpose,
            "paper": self.paper,
            "room": self.room,
            "state": self.state,
            "command": self.command or None,
            "evidence": f"evidence/{self.slug}.json" if _recorded(self.slug) else None,
        }

    def measure(self, quick: bool) -> dict[str, Any]:
        """Run the evidence. Raises UnsupportedError while there is none."""
        if self.evidence is None:
            raise UnsupportedError(
                f"{self.slug} is not built yet: 'stretto systems' lists what is; nothing was measured"
            )
        found = dict(self.evidence(quick))
        claims = found.pop("claims")
        for claim in claims:
            assert set(claim) == set(ROW), f"a claim of {self.slug} must have the keys {ROW}"
        missing = {c.name for c in self.claims} - {c["name"] for c in claims}
        assert not missing, f"the evidence of {self.slug} says nothing about {missing}"
        holds = all(c["holds"] is True for c in claims)
        return {"system": self.slug, "holds": holds, "quick": quick, "claims": claims, **found}


def evidence_folder() -> Path:
    """``evidence`` of the checkout that this package runs from, else of the working directory."""
    root = Path(__file__).parents[3]
    return (root if (root / "pyproject.toml").is_file() else Path.cwd()) / "evidence"


def _recorded(slug: str) -> dict[str, Any] | None:
    try:
        found = json.loads((evidence_folder() / f"{slug}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
