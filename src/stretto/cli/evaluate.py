"""``stretto eval MODEL``: accuracy on held-out prompts, by task and family."""

from __future__ import annotations

from typing import Annotated

import typer

from stretto.cli.common import (
    Device, Dtype, Json, MethodName, Options, Seed, Tasks, Threads, emit, parse_pairs, progress, split_names, verb,
)


@verb
def evaluate(
    model: Annotated[str, typer.Argument(help="zoo:NAME, a directory, or a hub id.")] = "zoo:tiny",
    tasks: Tasks = "all",
    samples: Annotated[int, typer.Option("--samples", help="Prompts a task.")] = 64,
    method: MethodName = "ar",
    option: Options = None,
    seed: Seed = 1, dtype: Dtype = "auto", device: Device = "auto", threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Greedy accuracy on the held-out split of the workbook."""
    from stretto.bench.evaluate import evaluate as measure

    with progress(as_json) as report:
        result = measure(
            model, split_names(tasks), samples=samples, method=method, options=parse_pairs(option), seed=seed,
            dtype=dtype, device=device, threads=threads, progress=report,
        )
    if as_json:
        emit(result)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("family", "task", "accuracy", "±", "n")
    for row in result["rows"]:
        table.add_row(row["family"], row["task"], f"{row['accuracy']:.1%}", f"{row['stderr']:.1%}", str(row["n"]))
    for row in result["families"]:
        table.add_row(f"[bold]{row['family']}[/]", "[bold]all[/]", f"[bold]{row['accuracy']:.1%}[/]", "", str(row["n"]))
    Console().print(table)
