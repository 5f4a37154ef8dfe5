"""The models that ship: name -> folder; and what "zoo:NAME", a directory or a hub id stands for. Free of torch."""

from __future__ import annotations

from pathlib import Path

from stretto.errors import CheckpointError, UnknownNameError

__all__ = ["available", "resolve"]

FOLDER = Path(__file__).parent
PREFIX = "zoo:"


def available() -> dict[str, Path]:
    """Name -> folder of every model that is here."""
    return {p.parent.name: p.parent for p in sorted(FOLDER.glob("*/config.json"))}


def resolve(model: str | Path) -> Path:
    """The directory of "zoo:NAME", of a path, or of a hub id ("owner/name", fetched by huggingface-hub).

    Raises UnknownNameError for a zoo name that does not exist, CheckpointError for anything else that is not there.
    """
    name = str(model)
    if name.startswith(PREFIX):
        found = available()
        if name.removeprefix(PREFIX) not in found:
            raise UnknownNameError("zoo model", name, [PREFIX + n for n in found])
        return found[name.removeprefix(PREFIX)]
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{name} is a file: give the directory that holds config.json")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _fetch(name)
    raise CheckpointError(
        f"there is no model {name!r}: give a directory in Hugging Face layout, a hub id (owner/name), or one of "
        f"{', '.join(PREFIX + n for n in available())}"
    )


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
    except Exception as e:  # the library raises many kinds; the reason is what counts
        raise CheckpointError(f"{name} could not be fetched from the hub: {e}") from e
