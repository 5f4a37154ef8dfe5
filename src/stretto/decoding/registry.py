"""The methods, found by reading the files of this room; nothing is imported until a method is used.

A method is a class in its own file with literal class attributes ``name`` and ``lossless`` (optional: ``aliases``,
``kinds`` = attention kinds it serves, ``reference`` = (method, options) that a lossless one equals), whose docstring's
first line says what the user gets; its options are the class ``Options`` of the same file. Adding a file registers a
method; two with one name are refused.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from stretto.decoding.options import parse_options
from stretto.errors import UnknownNameError

__all__ = ["METHODS", "MethodInfo", "OptionInfo", "get", "make"]


@dataclass(frozen=True, slots=True)
class OptionInfo:
    name: str
    type: str
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """``lossless``: equals plain decoding token for token in deterministic mode; ``reference``: the method and its
    options that are meant by plain decoding. ``kinds``: attention kinds of the models it runs on. ``target``:
    "module:Class"."""

    name: str
    purpose: str
    lossless: bool
    target: str
    aliases: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("causal",)
    reference: tuple[str, Mapping[str, Any]] = ("ar", {})
    options: tuple[OptionInfo, ...] = field(default=())


def _literals(body: list[ast.stmt]) -> dict[str, Any]:
    out = {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and value is not None:
            try:
                out[target.id] = ast.literal_eval(value)
            except ValueError:
                continue
    return out


def _options(node: ast.ClassDef) -> tuple[OptionInfo, ...]:
    out = []
    for item in node.body:
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.value, ast.Call)):
            continue
        args = [ast.literal_eval(a) for a in item.value.args]
        keywords = {k.arg: ast.literal_eval(k.value) for k in item.value.keywords if k.arg}
        out.append(OptionInfo(ast.unparse(item.target), ast.unparse(item.annotation), *args, **keywords))
    return tuple(out)


def _read(path: Path) -> list[MethodInfo]:
    tree = ast.parse(path.read_text())
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    options = next((_options(n) for n in classes if n.name == "Options"), ())
    out = []
    for node in classes:
        facts = _literals(node.body)
        if "name" in facts and "lossless" in facts:
            purpose = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
            out.append(
                MethodInfo(
                    facts["name"], purpose, facts["lossless"], f"stretto.decoding.{path.stem}:{node.name}",
                    tuple(facts.get("aliases", ())), tuple(facts.get("kinds", ("causal",))),
                    facts.get("reference", ("ar", {})), options,
                )
            )
    return out


@lru_cache(maxsize=1)
def _load() -> dict[str, MethodInfo]:
    found: dict[str, MethodInfo] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for info in _read(path):
            if info.name in found:
                raise ValueError(f"two methods are called {info.name!r}")
            found[info.name] = info
    return dict(sorted(found.items(), key=lambda item: (item[0] != "ar", item[0])))


class _Methods(Mapping[str, MethodInfo]):
    """name -> MethodInfo, read at first use."""

    def __getitem__(self, name: str) -> MethodInfo:
        return _load()[name]

    def __iter__(self):
        return iter(_load())

    def __len__(self) -> int:
        return len(_load())


METHODS: Mapping[str, MethodInfo] = _Methods()


def get(name: str) -> MethodInfo:
    """By name or alias; UnknownNameError names the nearest."""
    for info in METHODS.values():
        if name == info.name or name in info.aliases:
            return info
    raise UnknownNameError("method", name, METHODS)


def make(name: str, host: Any, options: Mapping[str, Any] | None = None) -> Any:
    """The method on ``host`` (stretto.engine.host.Host) with checked options."""
    info = get(name)
    module, _, cls = info.target.partition(":")
    loaded = importlib.import_module(module)
    parsed = parse_options(loaded.Options, options or {}, info.name)
    return getattr(loaded, cls)(host, parsed)
