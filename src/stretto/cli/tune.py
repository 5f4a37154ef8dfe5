"""``stretto tune MODEL``: find the method that pays on your own prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stretto.cli.common import (
    Config,
    Device,
    Dtype,
    Json,
    Model,
    Threads,
    emit,
    progress,
    split_names,
    verb,
)
from stretto.errors import InputError


@verb
def tune(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Argument(
            help="A file: one prompt a line, or JSON lines with 'prompt' (and 'answer')."
        ),
    ],
    quality: Annotated[
        str, typer.Option("--quality", help="'lossless', or the share that may be lost.")
    ] = "lossless",
    out: Annotated[
        Path | None, typer.Option("--out", help="Profile file (default: the user's own).")
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Methods to try, comma-separated; 'all'.")
    ] = "all",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Most tokens of an answer.")
    ] = 128,
    batch: Annotated[int, typer.Option("--batch", help="Prompts decoded at the same time.")] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Find what pays on your own prompts.

    The fastest admissible method is kept as a profile, which --method auto uses.
    """
    items = _read(prompts)
    if not as_json:
        typer.echo(f"stretto tune {model}: {len(items)} prompts", err=True)
    from stretto.bench.tune import tune as search

    with progress(as_json) as report:
        result = search(
            model,
            items,
            quality=quality,
            out=out,
            methods=split_names(methods),
            max_tokens=max_tokens,
            batch=batch,
            dtype=dtype,
            device=device,
            threads=threads,
            progress=report,
        )
    if as_json:
        emit(result)
        return
    settings = " ".join(f"{k}={v}" for k, v in result["options"].items())
    typer.echo(f"{result['method']} {settings}: {result['speedup']:.2f} times plain decoding")
    typer.echo(f"{result['reason']}\nprofile: {result['path']} (used by --method auto)")


def _read(path: Path) -> list[Any]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return [
        _object(path, number, line) if line.lstrip().startswith("{") else line
        for number, line in enumerate(lines, 1)
    ]


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number} is no JSON: {error}") from None
    if "prompt" not in item:
        raise InputError(f"{path}, line {number} has no 'prompt': its keys are {', '.join(item)}")
    return item
