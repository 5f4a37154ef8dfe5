"""``stretto eval MODEL``: accuracy on held-out prompts, by task and family."""

from __future__ import annotations

from typing import Annotated

import typer

from stretto.cli.common import (
    Config,
    Device,
    Dtype,
    Json,
    MethodName,
    Model,
    Options,
    Seed,
    Tasks,
    Threads,
    emit,
    parse_pairs,
    progress,
    split_names,
    verb,
)


@verb
def evaluate(
    model: Model = "zoo:tiny",
    tasks: Tasks = "all",
    samples: Annotated[int, typer.Option("--samples", help="Prompts a task.")] = 64,
    method: MethodName = "ar",
    option: Options = None,
    seed: Seed = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy on held-out prompts."""
    from stretto.bench.evaluate import evaluate as measure

    with progress(as_json) as report:
        result = measure(
            model,
            split_names(tasks),
            samples=samples,
            method=method,
            options=parse_pairs(option),
            seed=seed,
            dtype=dtype,
            device=device,
            threads=threads,
            progress=report,
        )
    if as_json:
        emit(result)
        return
    from stretto.bench.table import print_evaluation

    print_evaluation(result)
