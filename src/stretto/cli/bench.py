"""``stretto bench MODEL``: every method against plain decoding, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stretto.cli.common import (
    Config,
    Device,
    Dtype,
    Json,
    Model,
    Seed,
    Tasks,
    Threads,
    emit,
    progress,
    split_names,
    verb,
)
from stretto.errors import OptionError


@verb
def bench(
    model: Model = "zoo:tiny",
    methods: Annotated[
        str, typer.Option("--methods", help="Methods, comma-separated; 'all'.")
    ] = "all",
    tasks: Tasks = "",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="METHOD.KEY=VALUE", help="Option of a method."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute, wider spreads.")] = False,
    samples: Annotated[int | None, typer.Option("--samples", help="Prompts a task.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Prompts decoded at the same time.")] = 1,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report here.")] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also transformers and llama.cpp, where installed.")
    ] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Not deterministic: 'equal' is then a share.")
    ] = False,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Measure methods side by side.

    For each: speed-up, tokens per forward, share of the same text, quality.
    """
    if not as_json:
        typer.echo(f"stretto bench {model}: loading", err=True)
    from stretto.bench.runner import bench as measure

    with progress(as_json) as report:
        result = measure(
            model,
            split_names(methods),
            ["all"] if tasks == "all" else split_names(tasks),
            quick=quick,
            samples=samples,
            batch=batch,
            html=html,
            peers=peers,
            seed=seed,
            threads=threads,
            dtype=dtype,
            device=device,
            deterministic=not fast,
            options=_options(option),
            progress=report,
        )
    if as_json:
        emit(result)
        return
    from stretto.bench.table import print_rows

    print_rows(result)


def _options(pairs: list[str] | None) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for pair in pairs or ():
        name, sep, value = pair.partition("=")
        method, dot, key = name.partition(".")
        if not sep or not dot:
            raise OptionError("-o", pair, "METHOD.KEY=VALUE")
        out.setdefault(method, {})[key] = value
    return out
