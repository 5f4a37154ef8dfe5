"""The public names, and nothing else."""

import importlib
from pathlib import Path

import pytest

import stretto
from stretto.decoding.registry import METHODS


def test_public_names():
    assert stretto.__all__ == [
        "LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__", "errors", "load",
    ]
    for name in stretto.__all__:
        assert getattr(stretto, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        stretto.nothing  # noqa: B018


@pytest.mark.parametrize("path", sorted(Path(stretto.__file__).parent.rglob("*.py")), ids=lambda p: p.stem)
def test_every_module_lists_only_names_that_exist(path):
    parts = path.relative_to(Path(stretto.__file__).parent).with_suffix("").parts
    name = ".".join(("stretto", *parts)).removesuffix(".__init__")
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), f"{name}.{public}"


@pytest.mark.parametrize("info", METHODS.values(), ids=lambda i: i.name)
def test_the_listing_equals_the_class(info):
    module, _, cls = info.target.partition(":")
    loaded = getattr(importlib.import_module(module), cls)
    assert (loaded.name, loaded.lossless) == (info.name, info.lossless)
    assert tuple(getattr(loaded, "kinds", ("causal",))) == info.kinds and info.purpose
    assert len(info.purpose) < 120 and info.purpose.endswith(".")
