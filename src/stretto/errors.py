"""The tree of exceptions. Every message says what was given, what is allowed, and what to do next.

    StrettoError
    |-- InputError            the caller gave something unusable (exit code 2, HTTP 400)
    |   |-- UnknownNameError      a name that does not exist; carries the nearest ones that do
    |   |-- OptionError           an option with a wrong value or type
    |   |-- PromptError           empty, too long, or out-of-vocabulary prompt
    |   `-- UnsupportedError      a valid request that this model or method cannot serve
    |-- CheckpointError       files that cannot be read as a model
    |   |-- ArchitectureError     unknown model_type, rope type, quantization
    |   `-- WeightsError          missing, unexpected, misshapen, NaN or unreadable tensors
    |-- CapacityError         a limit of memory, queue or cache (HTTP 429 or 503)
    |-- MissingExtraError     an optional dependency is not installed
    `-- EngineError           the engine died or was closed (HTTP 503)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArchitectureError",
    "CapacityError",
    "CheckpointError",
    "EngineError",
    "InputError",
    "MissingExtraError",
    "OptionError",
    "PromptError",
    "StrettoError",
    "UnknownNameError",
    "UnsupportedError",
    "WeightsError",
]


class StrettoError(Exception):
    """Base of every error that stretto raises on purpose."""


class InputError(StrettoError):
    """The caller gave something unusable."""


class UnknownNameError(InputError):
    """A name that does not exist; the message names the nearest ones that do."""

    def __init__(self, kind: str, given: str, allowed: Iterable[str]):
        self.kind, self.given, self.allowed = kind, given, sorted(allowed)
        near = difflib.get_close_matches(given, self.allowed, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(f"unknown {kind} {given!r}: {hint}allowed: {', '.join(self.allowed)}")


class OptionError(InputError):
    """An option with a wrong value or type."""

    def __init__(self, name: str, value: object, allowed: str):
        self.name, self.value = name, value
        super().__init__(f"{name}={value!r} is not allowed: {allowed}")


class PromptError(InputError):
    """Empty, too long, or out-of-vocabulary prompt."""


class UnsupportedError(InputError):
    """A valid request that this model or method cannot serve."""


class CheckpointError(StrettoError):
    """Files that cannot be read as a model."""


class ArchitectureError(CheckpointError):
    """Unknown model_type, rope type or quantization."""


class WeightsError(CheckpointError):
    """Missing, unexpected, misshapen, NaN or unreadable tensors."""


class CapacityError(StrettoError):
    """A limit of memory, queue or cache was reached."""


class MissingExtraError(StrettoError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(
            f"{package} is not installed; it comes with: pip install 'stretto[{extra}]'"
        )


class EngineError(StrettoError):
    """The engine died or was closed."""
