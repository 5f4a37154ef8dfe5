"""stretto: language models in parallel. Many published methods on one engine, measured side by side.

    from stretto import LLM, SamplingParams, load

Names load when used: ``import stretto`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stretto import errors as errors
    from stretto.engine.params import SamplingParams as SamplingParams
    from stretto.llm import LLM as LLM
    from stretto.llm import CompletionOutput as CompletionOutput
    from stretto.llm import RequestOutput as RequestOutput
    from stretto.models.checkpoint import load as load

__version__ = "0.1.0"

_HOMES = {
    "LLM": "stretto.llm",
    "CompletionOutput": "stretto.llm",
    "RequestOutput": "stretto.llm",
    "SamplingParams": "stretto.engine.params",
    "load": "stretto.models.checkpoint",
}
__all__ = [
    "LLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "errors",
    "load",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("stretto.errors")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'stretto' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
