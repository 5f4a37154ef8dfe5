"""Typed options of a method: a frozen keyword-only dataclass whose fields are made by ``option``. Free of torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_type_hints

from stretto.errors import OptionError, UnknownNameError

__all__ = ["option", "parse_options"]

T = TypeVar("T")


def option(
    default: Any, help: str, *, low: float | None = None, high: float | None = None,
    choices: tuple[Any, ...] = (),
) -> Any:
    """A dataclass field: its default, one line of help with the paper's symbol and unit, and what is allowed."""
    meta = {"help": help, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=meta)


def parse_options(cls: type[T], given: Mapping[str, Any], method: str) -> T:
    """Build ``cls`` from keys as they come from Python, YAML, JSON or ``-o key=value``; strings are converted.

    Raises UnknownNameError for an unknown key, OptionError for a wrong type or a value out of range.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    values = {}
    for key, value in given.items():
        if key not in fields:
            raise UnknownNameError(f"option of method {method!r}", key, fields)
        values[key] = _value(f"{method}.{key}", value, hints[key], fields[key].metadata)
    return cls(**values)


def _value(name: str, value: Any, hint: Any, meta: Mapping[str, Any]) -> Any:
    kinds = [k for k in (get_args(hint) or (hint,)) if isinstance(k, type)]
    if value is None or value == "none":
        if type(None) in kinds:
            return None
    value = _convert(name, value, kinds)
    if meta.get("choices") and value not in meta["choices"]:
        raise OptionError(name, value, f"one of {', '.join(map(str, meta['choices']))}")
    low, high = meta.get("low"), meta.get("high")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if (low is not None and value < low) or (high is not None and value > high):
            raise OptionError(name, value, f"from {low} to {high}")
        if value != value:
            raise OptionError(name, value, "a number")
    return value


def _convert(name: str, value: Any, kinds: list[type]) -> Any:
    if bool in kinds:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "1", "yes", "on", "false", "0", "no", "off"):
            return str(value).lower() in ("true", "1", "yes", "on")
        raise OptionError(name, value, "true or false")
    for kind in (int, float):
        if kind in kinds and not isinstance(value, bool):
            try:
                number = kind(value)
            except (TypeError, ValueError):
                continue
            if kind is float or float(value) == number:
                return number
    if str in kinds and isinstance(value, str):
        return value
    wanted = " or ".join(k.__name__ for k in kinds if k is not type(None))
    raise OptionError(name, value, f"a value of type {wanted}")
