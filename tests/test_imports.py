"""Imports point downwards only: a room may use those below it, never one above or beside it in the same row."""

import ast
from pathlib import Path

import pytest

import stretto

ROOT = Path(stretto.__file__).parent
ROWS = [  # from the top; a room may import what stands in later rows
    {"cli"},
    {"systems"},
    {"serving", "threads", "multimodal", "pipelines", "programs", "science", "bench"},
    {"llm"},
    {"shared"},
    {"session"},
    {"joins", "stems"},
    {"account"},
    {"training"},
    {"planning"},
    {"decoding"},
    {"experts"},
    {"engine"},
    {"parallel"},
    {"models"},
    {"zoo"},
    {"machine"},
    {"outline"},
    {"tags"},
    {"errors"},
]
LEVEL = {room: i for i, row in enumerate(ROWS) for room in row}
ABOVE = {("zoo", "models")}  # the checks of the zoo's own folders may load them


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)


FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.parent != ROOT or not p.stem.startswith("__")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert here in LEVEL, f"room {here!r} has no place in the order"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "stretto" or len(parts) < 2 or parts[1] not in LEVEL or parts[1] == here:
            continue
        assert LEVEL[parts[1]] > LEVEL[here] or (here, parts[1]) in ABOVE, f"{here} imports {name}"


def test_the_engine_names_no_method():
    from stretto.decoding.registry import METHODS

    for path in (ROOT / "engine").glob("*.py"):
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not strings & set(METHODS), path.name
    step = next(
        n for n in ast.walk(ast.parse((ROOT / "engine" / "engine.py").read_text()))
        if isinstance(n, ast.FunctionDef) and n.name == "step"
    )
    assert step.end_lineno - step.lineno < 40
