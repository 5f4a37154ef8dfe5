"""The tags of parallel blocks: how each system calls them, and the file beside the weights that says so."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stretto.errors import CheckpointError, UnsupportedError

__all__ = ["MULTIVERSE", "TAGS_FILE", "THREADWEAVER", "Tags", "read_tags", "write_tags"]

TAGS_FILE = "parallel_tags.json"  # beside the weights of a model that was trained with tags


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags:
    """The names of the tags. ``conclusion_open`` None: blocks have no conclusion. ``nested``: a path may hold blocks
    (else tags inside of it are plain text). ``loose``: plain tokens may stand between the parts of a block, which only
    a text that is read causally can have. ``header``: what is forced behind ``path_open``."""

    open: str = "<Parallel>"
    close: str = "</Parallel>"
    goal_open: str = "<Goal>"
    goal_close: str = "</Goal>"
    outline_open: str = "<Outline>"
    outline_close: str = "</Outline>"
    path_open: str = "<Path>"
    path_close: str = "</Path>"
    conclusion_open: str | None = "<Conclusion>"
    conclusion_close: str | None = "</Conclusion>"
    header: str = "{number}:"
    nested: bool = True
    loose: bool = False

    @property
    def names(self) -> dict[str, str]:
        """Role -> tag, of those that there are."""
        flags = ("header", "nested", "loose")
        return {role: tag for role, tag in asdict(self).items() if role not in flags and tag is not None}


MULTIVERSE = Tags()
THREADWEAVER = Tags(
    path_open="<|thread|>", path_close="<|/thread|>", conclusion_open=None, conclusion_close=None, nested=False,
    loose=True,
)


def write_tags(folder: Path, tags: Tags, **more: Any) -> None:
    """Say beside the weights with which tags, and with what else, a model was trained."""
    (folder / TAGS_FILE).write_text(json.dumps({"tags": asdict(tags), **more}, indent=1) + "\n")


def read_tags(folder: Path) -> tuple[Tags, dict[str, Any]]:
    """(tags, what else was said). Raises UnsupportedError for a model that was trained without."""
    path = folder / TAGS_FILE
    if not path.is_file():
        raise UnsupportedError(f"{folder} has no {TAGS_FILE}: its model was not trained to write parallel blocks")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Tags(**found.pop("tags")), found
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path} cannot be read: {e!r}") from e
