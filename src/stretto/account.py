"""What a session says of its threads: what they generated, step by step or as a whole, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

from stretto.engine.types import Metrics

__all__ = ["Event", "Generated", "Usage"]


@dataclass(slots=True)
class Generated:
    """What one ``gen`` added to a thread; ``logprobs`` as in CompletionOutput."""

    thread: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, float]] | None
    metrics: Metrics


@dataclass(slots=True)
class Event:
    """A step's news of one thread: its new final tokens, and why it ended if it did."""

    thread: int
    token_ids: list[int]
    finish_reason: str | None


@dataclass(slots=True)
class Usage:
    """The account of a session. ``evaluated``: rows of all forwards, drafts included; ``generated``: final tokens;
    ``critical_path``: tokens of the longest dependent chain; ``forwards``: those that ran while it waited."""

    evaluated: int = 0
    generated: int = 0
    critical_path: int = 0
    forwards: int = 0
