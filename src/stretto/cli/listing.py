"""``stretto methods`` and ``stretto systems``: what is here, without importing torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from stretto.cli.common import Json, emit, verb


@verb
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, for its options.")] = None, as_json: Json = False
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
        return
    typer.echo(f"{info.name}: {info.purpose}")
    typer.echo(f"lossless: {'yes' if info.lossless else 'no'}; models with {' or '.join(info.kinds)} attention")
    if info.aliases:
        typer.echo(f"also called {', '.join(info.aliases)}")
    for o in info.options:
        span = f" ({_bounds(o)})" if _bounds(o) else ""
        typer.echo(f"  -o {o.name}={o.default}  [{o.type}]{span}  {o.help}")


def _public(info: Any) -> dict[str, Any]:
    data = asdict(info)
    data.pop("target")
    return data


def _bounds(option: Any) -> str:
    if option.choices:
        return ", ".join(option.choices)
    if option.low is None and option.high is None:
        return ""
    low = "" if option.low is None else f"from {option.low:g}"
    high = "" if option.high is None else f"to {option.high:g}"
    return f"{low} {high}".strip()


@verb
def systems(as_json: Json = False) -> None:
    """List the published systems with their state here: works, partial or missing."""
    from stretto.systems import all_systems

    rows = [s.row() for s in all_systems()]
    if as_json:
        emit({"systems": rows})
        return
    for row in rows:
        typer.echo(f"{row['slug']:28} {row['state']:8} {row['purpose']}")
    states = [r["state"] for r in rows]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("works", "partial", "missing"))
    typer.echo(f"{len(rows)} systems: {counts}")
