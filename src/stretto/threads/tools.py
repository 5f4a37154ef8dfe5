"""Tools as a request names them: names, parameters in order, and what text makes of a value of each type."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stretto.errors import InputError

__all__ = ["Parameter", "Tool", "convert", "parse_tools", "prompt_of"]

TYPES = ("string", "integer", "number", "boolean", "array", "object")


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    type: str
    enum: tuple[Any, ...] = ()
    required: bool = True


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    parameters: tuple[Parameter, ...]


def parse_tools(tools: Sequence[Mapping[str, Any] | Tool]) -> list[Tool]:
    """From OpenAI's form. Raises InputError for a missing name, a duplicate, or a type that no slot can hold."""
    out: list[Tool] = []
    for item in tools:
        tool = item if isinstance(item, Tool) else _parse(item)
        if tool.name in (t.name for t in out):
            raise InputError(f"two tools are called {tool.name!r}: names must differ")
        out.append(tool)
    if not out:
        raise InputError("no tool was given: tools needs at least one function")
    return out


def _parse(item: Mapping[str, Any]) -> Tool:
    function = item.get("function", item)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(f"a tool needs function.name, a string; got {item!r}")
    name, schema = function["name"], function.get("parameters") or {}
    properties, required = schema.get("properties", {}), schema.get("required")
    parameters = []
    for key, value in properties.items():
        kind = value.get("type", "string")
        if kind not in TYPES:
            raise InputError(f"tool {name!r}: parameter {key!r} has type {kind!r}; allowed: {', '.join(TYPES)}")
        optional = required is not None and key not in required
        parameters.append(Parameter(key, kind, tuple(value.get("enum", ())), not optional))
    return Tool(name, tuple(parameters))


def prompt_of(tools: Sequence[Tool], query: str) -> str:
    """The user's turn: one line a tool, then the query. What does not change stands first, so that it is cached."""
    lines = [f"Tool: {t.name}({', '.join(f'{p.name}: {p.type}' for p in t.parameters)})" for t in tools]
    return "\n".join([*lines, query])


def convert(text: str, parameter: Parameter) -> Any:
    """The value that ``text`` is by the schema's type, never by its looks. Raises ValueError if it is none."""
    value: Any = text
    if parameter.type == "integer":
        value = int(text)
    elif parameter.type == "number":
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(text)
    elif parameter.type == "boolean":
        value = {"true": True, "false": False}.get(text)
        if value is None:
            raise ValueError(text)
    elif parameter.type in ("array", "object"):
        value = json.loads(text)
        if not isinstance(value, list if parameter.type == "array" else dict):
            raise ValueError(text)
    if parameter.enum and value not in parameter.enum:
        raise ValueError(text)
    return value
