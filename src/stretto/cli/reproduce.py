"""``stretto reproduce SLUG``: measure the claims of one published system here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stretto.cli.common import Json, emit, verb


@verb
def reproduce(
    slug: Annotated[str, typer.Argument(help="A system; 'stretto systems' lists them.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller samples; the evidence file is not written.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the evidence file (default: evidence).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the claims of a published system.

    Each stands next to its baseline from the same run; the result goes to evidence/SLUG.json.
    """
    from stretto.systems import evidence_folder, get, write_evidence

    system = get(slug)
    if system.evidence is not None and not as_json:
        typer.echo(f"stretto reproduce {slug}: {len(system.claims)} claims", err=True)
    result = system.measure(quick)
    path = None if quick else write_evidence(result, out or evidence_folder())
    if as_json:
        emit(result)
    else:
        _show(result, path)


def _show(result: dict[str, Any], path: Path | None) -> None:
    for claim in result["claims"]:
        typer.echo(f"{'holds' if claim['holds'] else 'NO':6} {claim['name']}: {claim['measured']}")
        typer.echo(f"{'':6}   paper: {claim['paper']}; bar: {claim['bar']}")
        typer.echo(f"{'':6}   baseline: {claim['baseline']}  {claim['note']}".rstrip())
    words = "holds" if result["holds"] else "does not hold as a whole"
    typer.echo(f"{result['system']}: {words}")
    if path:
        typer.echo(f"evidence: {path}")
