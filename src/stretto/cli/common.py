"""What the verbs share: option types, errors as one line and an exit code, JSON output, a progress bar."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer

from stretto.errors import InputError, OptionError, StrettoError

__all__ = [
    "Deterministic", "Device", "Dtype", "Json", "MethodName", "Options", "Seed", "Tasks", "Threads", "emit",
    "parse_pairs", "progress", "split_names", "verb",
]

F = TypeVar("F", bound=Callable[..., Any])

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
MethodName = Annotated[str, typer.Option("--method", "-m", help="Decoding method; 'stretto methods' lists them.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="Option of the method; repeatable.")
]
Tasks = Annotated[str, typer.Option("--tasks", help="Tasks or families, comma-separated; 'all'.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads (default: torch's choice).")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Lossless methods equal plain decoding exactly.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


def verb(function: F) -> F:
    """Turn errors into one line on stderr (with --json: an object on stdout) and an exit code.

    2: the caller's input; 1: anything else that stretto raises on purpose; 130: interrupted.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except StrettoError as error:
            code = 2 if isinstance(error, InputError) else 1
            if kwargs.get("as_json"):
                emit({"error": {"type": type(error).__name__, "message": str(error)}})
            else:
                typer.echo(f"stretto: {error}", err=True)
            raise typer.Exit(code) from None
        except KeyboardInterrupt:
            typer.echo("stretto: interrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(1) from None

    return wrapped  # type: ignore[return-value]


def emit(data: Any) -> None:
    """Print one JSON object."""
    typer.echo(json.dumps(data, ensure_ascii=False, default=str))


def parse_pairs(pairs: Sequence[str] | None) -> dict[str, str]:
    """``key=value`` strings to a dict; values are typed by whoever owns the keys."""
    out = {}
    for pair in pairs or ():
        key, sep, value = pair.partition("=")
        if not sep or not key:
            raise OptionError("-o", pair, "key=value")
        out[key.strip()] = value
    return out


def split_names(text: str) -> list[str]:
    """Comma-separated names; "all" or nothing gives an empty list."""
    names = [n.strip() for n in text.split(",") if n.strip()]
    return [] if names == ["all"] else names


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[float, str], None] | None]:
    """A bar on stderr: call it with (share done, what is being done)."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.percentage:>3.0f}%"), BarColumn(bar_width=30), TimeElapsedColumn(),
        TextColumn("{task.description}"), console=console, transient=True,
    ) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda share, text: bar.update(task, completed=share, description=text)
