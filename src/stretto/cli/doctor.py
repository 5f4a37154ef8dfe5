"""``stretto doctor``: what this machine can do, and what is missing."""

from __future__ import annotations

import typer

from stretto.cli.common import Json, Threads, emit, verb


@verb
def doctor(threads: Threads = None, as_json: Json = False) -> None:
    """Check the installation and this machine.

    ok: there; --: missing, costs speed or a feature; NO: missing and needed (exit code 1).
    """
    if not as_json:
        typer.echo("stretto doctor: a few seconds of measuring", err=True)
    from stretto.bench.doctor import doctor as examine

    result = examine(threads)
    if as_json:
        emit(result)
    else:
        for check in result["checks"]:
            mark = "ok" if check["ok"] else "NO" if check["needed"] else "--"
            typer.echo(f"{mark:3} {check['name']:24} {check['value']}")
    if not result["ok"]:
        raise typer.Exit(1)
