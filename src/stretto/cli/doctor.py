"""``stretto doctor``: what this machine can do, and what is missing."""

from __future__ import annotations

import typer

from stretto.cli.common import Json, Threads, emit, verb


@verb
def doctor(threads: Threads = None, as_json: Json = False) -> None:
    """Check the installation, the processor, the fast paths and the shipped models."""
    from stretto.bench.doctor import doctor as examine

    result = examine(threads)
    if as_json:
        emit(result)
    else:
        for check in result["checks"]:
            typer.echo(f"{'ok' if check['ok'] else '--':3} {check['name']:24} {check['value']}")
    if not result["ok"]:
        raise typer.Exit(1)
