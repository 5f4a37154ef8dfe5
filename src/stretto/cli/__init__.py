"""One file a verb; no logic. Parses arguments, calls the rooms below, prints.

It never imports torch before a verb needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from stretto import __version__
from stretto.cli import bench, chat, doctor, evaluate, listing, reproduce, run, scale, serve, train, tune
from stretto.cli.common import Group

__all__ = ["app", "main"]

ABOUT = "Language models in parallel: many published methods on one engine, measured side by side."

app = typer.Typer(
    name="stretto",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help=ABOUT,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("bench")(bench.bench)
app.command("eval")(evaluate.evaluate)
app.command("tune")(tune.tune)
app.command("scale")(scale.scale)
app.command("train")(train.train)
app.command("methods")(listing.methods)
app.command("systems")(listing.systems)
app.command("reproduce")(reproduce.reproduce)
app.command("doctor")(doctor.doctor)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"stretto {__version__}")
        raise typer.Exit


@app.callback(help=ABOUT)
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What stands before the verb."""


def main() -> None:
    """The console script."""
    app()
