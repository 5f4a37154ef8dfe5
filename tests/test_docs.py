"""Documents that stay true: the map names every file, the README's example runs, links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for p in (ROOT / "src" / "stretto").rglob("*") if p.suffix in (".py", ".c", ".h"))


def test_the_map_names_every_file():
    text = (ROOT / "docs" / "map.md").read_text()
    listed = [p for p in SOURCES if p.name != "__init__.py" and p.parent.name != "systems"]
    missing = [p.relative_to(ROOT) for p in listed if f"{p.name}`" not in text]
    assert not missing, f"add a line to docs/map.md for {missing}"


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_readmes_examples_run(capsys):
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec(compile(first, "README.md", "exec"), {})
    words = capsys.readouterr().out.split()
    assert int(words[-2]) >= 1 and float(words[-1]) >= 1.0
    exec(compile(second, "README.md", "exec"), {})
    assert " | " in capsys.readouterr().out
