"""``stretto methods`` and ``stretto systems``: what is here, without importing torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from stretto.cli.common import Json, emit, verb


@verb
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, for its options.")] = None,
    as_json: Json = False,
) -> None:
    """List the decoding methods, or the options of one."""
    from stretto.decoding.registry import METHODS, get

    if name is None:
        if as_json:
            emit({"methods": [_public(m) for m in METHODS.values()]})
            return
        for m in METHODS.values():
            typer.echo(f"{m.name:12} {'lossless' if m.lossless else '-':9} {m.purpose}")
        return
    info = get(name)
    if as_json:
        emit(_public(info))
    else:
        _describe(info)


def _describe(info: Any) -> None:
    typer.echo(f"{info.name}: {info.purpose}")
    kinds = " or ".join(info.kinds)
    typer.echo(f"lossless: {'yes' if info.lossless else 'no'}; models with {kinds} attention")
    if info.aliases:
        typer.echo(f"also called {', '.join(info.aliases)}")
    if not info.options:
        typer.echo("no options")
        return
    rows = [(f"-o {o.name}={o.default}", o.type, _bounds(o), o.help) for o in info.options]
    wide = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        cells = "  ".join(f"{cell:{w}}" for cell, w in zip(row[:3], wide, strict=True))
        typer.echo(f"  {cells}  {row[3]}")


def _public(info: Any) -> dict[str, Any]:
    data = asdict(info)
    data.pop("target")
    return data


def _bounds(option: Any) -> str:
    if option.choices:
        return ", ".join(map(str, option.choices))
    low = "" if option.low is None else f"from {option.low:g}"
    high = "" if option.high is None else f"to {option.high:g}"
    return f"{low} {high}".strip()


@verb
def systems(
    slug: Annotated[str | None, typer.Argument(help="A system, for its paper and claims.")] = None,
    as_json: Json = False,
) -> None:
    """List the published systems and their state.

    works: measured here, every claim holds; partial: some of it; missing: not built yet.
    """
    from stretto.systems import all_systems, get

    if slug is not None:
        system = get(slug)
        if as_json:
            emit(
                {
                    **system.row(),
                    "parts": system.parts,
                    "claims": [asdict(c) for c in system.claims],
                }
            )
        else:
            _explain(system)
        return
    rows = [s.row() for s in all_systems()]
    if as_json:
        emit({"systems": rows})
        return
    for row in rows:
        typer.echo(f"{row['slug']:28} {row['state']:8} {row['purpose']}")
    states = [r["state"] for r in rows]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("works", "partial", "missing"))
    typer.echo(f"{len(rows)} systems: {counts}")


def _explain(system: Any) -> None:
    row = system.row()
    typer.echo(f"{system.title}: {system.purpose}")
    typer.echo(f"paper: {system.paper}")
    typer.echo(f"state: {row['state']}; room: {system.room}; evidence: {row['evidence'] or 'none'}")
    if row["command"]:
        typer.echo(f"command: {row['command']}")
    typer.echo("claims:")
    for claim in system.claims:
        typer.echo(f"  {claim.name}: {claim.paper}")
        if claim.bar:
            typer.echo(f"    here: {claim.bar}")
