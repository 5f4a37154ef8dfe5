"""``stretto tune MODEL``: find the method that pays on your own prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stretto.cli.common import Device, Dtype, Json, Threads, emit, progress, split_names, verb
from stretto.errors import InputError, OptionError


@verb
def tune(
    model: Annotated[str, typer.Argument(help="zoo:NAME, a directory, or a hub id.")],
    prompts: Annotated[
        Path, typer.Argument(help="A file: one prompt a line, or JSON lines with 'prompt' (and 'answer').")
    ],
    quality: Annotated[str, typer.Option("--quality", help="'lossless', or the share that may be lost.")] = "lossless",
    out: Annotated[Path | None, typer.Option("--out", help="Profile file (default: the user's own).")] = None,
    methods: Annotated[str, typer.Option("--methods", help="Methods to try, comma-separated; 'all'.")] = "all",
    max_tokens: Annotated[int, typer.Option("--max-tokens")] = 128,
    batch: Annotated[int, typer.Option("--batch")] = 1,
    dtype: Dtype = "auto", device: Device = "auto", threads: Threads = None, as_json: Json = False,
) -> None:
    """Measure the methods on your prompts, keep the fastest, and let --method auto use it."""
    items = _read(prompts)
    from stretto.bench.tune import tune as search

    with progress(as_json) as report:
        result = search(
            model, items, quality=_quality(quality), out=out, methods=split_names(methods), max_tokens=max_tokens,
            batch=batch, dtype=dtype, device=device, threads=threads, progress=report,
        )
    if as_json:
        emit(result)
        return
    typer.echo(f"{result['method']} {result['options'] or ''}: {result['speedup']:.2f} times plain decoding")
    typer.echo(f"{result['reason']}\nprofile: {result['path']} (used by --method auto)")


def _quality(text: str) -> str | float:
    if text == "lossless":
        return text
    try:
        return float(text)
    except ValueError:
        raise OptionError("quality", text, "'lossless' or a number from 0 to 1") from None


def _read(path: Path) -> list[Any]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    out: list[Any] = []
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("{"):
            out.append(line)
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is no JSON: {error}") from None
        if "prompt" not in item:
            raise InputError(f"{path}, line {number} has no 'prompt': its keys are {', '.join(item)}")
        out.append(item)
    return out
