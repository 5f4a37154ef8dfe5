"""``stretto reproduce SLUG``: measure the claims of one published system here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stretto.cli.common import Json, emit, verb


@verb
def reproduce(
    slug: Annotated[str, typer.Argument(help="A system; 'stretto systems' lists them.")],
    quick: Annotated[bool, typer.Option("--quick", help="Smaller samples; the evidence file is not written.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the evidence file (default: evidence).")] = None,
    as_json: Json = False,
) -> None:
    """Measure a system's claims next to their baselines, and write evidence/SLUG.json."""
    from stretto.systems import get, write_evidence

    system = get(slug)
    result = system.measure(quick)
    path = None if quick else write_evidence(result, out or Path("evidence"))
    if as_json:
        emit(result)
        return
    for c in result["claims"]:
        mark = "holds" if c["holds"] else "NO"
        typer.echo(f"{mark:6} {c['name']}: {c['measured']} (bar {c['bar']}, paper {c['paper']}) {c['note']}")
    typer.echo(f"{slug}: {'holds' if result['holds'] else 'does not hold as a whole'}")
    if path:
        typer.echo(f"evidence: {path}")
