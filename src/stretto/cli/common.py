"""What the verbs share: option types, errors as one line and an exit code, JSON output, a progress bar."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from stretto.errors import InputError, OptionError, StrettoError, UnknownNameError

__all__ = [
    "Config",
    "Deterministic",
    "Device",
    "Dtype",
    "Group",
    "Json",
    "MethodName",
    "Model",
    "Options",
    "Seed",
    "Tasks",
    "Threads",
    "emit",
    "fail",
    "parse_pairs",
    "progress",
    "split_names",
    "verb",
]

F = TypeVar("F", bound=Callable[..., Any])


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a YAML file the defaults of this verb; what the command line says wins."""
    if path is None:
        return None
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(data, Mapping):
        raise InputError(f"{path} must hold a map of option to value, not a {type(data).__name__}")
    known = {_option_name(p): p for p in context.command.params if p.name != "config"}
    defaults = {}
    for key, value in data.items():
        key = str(key).replace("_", "-")
        key = "option" if key == "options" else key
        if key not in known:
            raise UnknownNameError(f"key of {path.name} for '{context.command.name}'", key, known)
        if isinstance(value, Mapping):
            value = _flatten(value)
        elif isinstance(value, list) and not getattr(known[key], "multiple", False):
            value = ",".join(map(str, value))
        defaults[known[key].name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _option_name(parameter: Any) -> str:
    """The long name of an option without its dashes; the name of an argument."""
    longest = max(parameter.opts, key=len)
    return longest.lstrip("-").replace("_", "-")


def _flatten(value: Any, prefix: str = "") -> list[str]:
    """The options of a method, as a map, as the KEY=VALUE (or METHOD.KEY=VALUE) of ``-o``."""
    if not isinstance(value, Mapping):
        return [f"{prefix}={str(value).lower() if isinstance(value, bool) else value}"]
    inner = (_flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items())
    return [pair for pairs in inner for pair in pairs]


Model = Annotated[str, typer.Argument(help="zoo:NAME, a directory, or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
MethodName = Annotated[
    str, typer.Option("--method", "-m", help="Decoding method; 'stretto methods' lists them.")
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="KEY=VALUE", help="Option of the method; repeatable."),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", is_eager=True, callback=_read_config, help="YAML file of options."),
]
Tasks = Annotated[str, typer.Option("--tasks", help="Tasks or families, comma-separated; 'all'.")]
Threads = Annotated[
    int | None, typer.Option("--threads", help="CPU threads (default: torch's choice).")
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Lossless methods equal plain decoding exactly.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


class Group(TyperGroup):
    """The verbs. A wrong command line is one line on stderr, and with --json an object on stdout."""

    def main(
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **extra: Any
    ) -> Any:  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in given
        try:
            code = super().main(given, standalone_mode=False, **{"prog_name": "stretto", **extra})
        except StrettoError as error:  # from the callback of an option
            code = fail(error, as_json)
        except Exception as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
                code = 0
            elif hasattr(error, "format_message"):
                code = _usage(error, as_json)
            else:
                if as_json:
                    emit({"error": {"type": type(error).__name__, "message": str(error)}})
                raise
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb; UnknownNameError names the nearest one."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise UnknownNameError("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


def _usage(error: Any, as_json: bool) -> int:
    """Report a command line that cannot be parsed."""
    message = " ".join(error.format_message().split()).rstrip(".")
    if as_json:
        emit({"error": {"type": "UsageError", "message": message}})
    else:
        context = getattr(error, "ctx", None)
        hint = f": see '{context.command_path} --help'" if context else ""
        typer.echo(f"stretto: {message}{hint}", err=True)
    return getattr(error, "exit_code", 2)


def fail(error: Exception, as_json: bool) -> int:
    """Report an error in one line; the exit code: 2 for the caller's input, 1 for anything else."""
    if as_json:
        emit({"error": {"type": type(error).__name__, "message": str(error)}})
    else:
        typer.echo(f"stretto: {error}", err=True)
    return 2 if isinstance(error, InputError) else 1


def verb(function: F) -> F:
    """Turn errors into one line on stderr (with --json: an object on stdout) and an exit code.

    2: the caller's input; 1: anything else that stretto raises on purpose, and files that cannot be
    read or written; 130: interrupted.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (StrettoError, OSError) as error:
            raise typer.Exit(fail(error, bool(kwargs.get("as_json")))) from None
        except KeyboardInterrupt:
            typer.echo("stretto: interrupted", err=True)
            raise typer.Exit(130) from None

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
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda share, text: bar.update(task, completed=share, description=text)
