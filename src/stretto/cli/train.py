"""``stretto train RECIPE``: remake a model of the zoo from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stretto.cli.common import Json, Threads, emit, verb


@verb
def train(
    recipe: Annotated[str | None, typer.Argument(help="Name of a recipe; nothing lists them.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Directory of the model (default: its name, here).")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Budget instead of the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Budget instead of the recipe's.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
    base: Annotated[str | None, typer.Option("--base", help="Model to start from instead of the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    device: Annotated[str, typer.Option("--device")] = "auto",
    threads: Threads = None, as_json: Json = False,
) -> None:
    """Train a model by its recipe: seeded, resumable, with a progress bar and a JSONL log."""
    from stretto.training.recipes import RECIPES, run_recipe

    if recipe is None:
        _list(as_json)
        return
    quiet = (lambda record: None) if as_json else None
    result = run_recipe(
        recipe, out=out, minutes=minutes, steps=steps, resume=not fresh, seed=seed, threads=threads, device=device,
        base=base, report=quiet,
    )
    emit({"recipe": recipe, **result}) if as_json else typer.echo(f"{recipe}: done, {RECIPES.get(recipe, '')}")


def _list(as_json: bool) -> None:
    from stretto.training.recipes import RECIPES

    rows = [{"name": r.name, "purpose": r.purpose} for r in RECIPES.values()]
    if as_json:
        emit({"recipes": rows})
        return
    for row in rows:
        typer.echo(f"{row['name']:22} {row['purpose']}")
