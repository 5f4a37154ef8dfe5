"""``stretto train RECIPE``: remake a model of the zoo from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stretto.cli.common import Config, Json, Threads, emit, verb
from stretto.errors import OptionError


@verb
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe. Without one: the list of them.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory of the model (default: its name, here).")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Budget instead of the recipe's.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Budget instead of the recipe's.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="Model to start from instead of the recipe's.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed instead of the recipe's.")
    ] = None,
    stage: Annotated[
        str, typer.Option("--stage", help="Stages of a recipe that has them: sft, self, rl; comma-separated.")
    ] = "",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    threads: Threads = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Train a model by its recipe.

    Seeded and resumable, with a progress bar and a JSONL log.
    """
    if recipe is None:
        _list(as_json)
        return
    from stretto.training.recipes import find_recipe, run_recipe

    found = find_recipe(recipe)
    if not as_json:
        typer.echo(f"stretto train {found.name}: {found.purpose}", err=True)
    if stage and not hasattr(found, "stages"):
        raise OptionError("stage", stage, f"nothing: {found.name} has one stage")
    result = run_recipe(
        found.name,
        out=out,
        minutes=minutes,
        steps=steps,
        resume=not fresh,
        seed=seed,
        threads=threads,
        device=device,
        base=base,
        changes={"stages": tuple(stage.split(","))} if stage else None,
        report=(lambda record: None) if as_json else None,
    )
    folder = str(out or found.model)
    if as_json:
        emit({**result, "recipe": found.name, "out": folder})
    else:
        typer.echo(f"{found.name}: written to {folder}")


def _list(as_json: bool) -> None:
    from stretto.training.recipes import RECIPES

    if as_json:
        emit({"recipes": [{"name": r.name, "purpose": r.purpose} for r in RECIPES.values()]})
        return
    for recipe in RECIPES.values():
        typer.echo(f"{recipe.name:22} {recipe.purpose}")
