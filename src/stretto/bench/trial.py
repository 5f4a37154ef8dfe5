"""One decoder on a list of prompts, as evidence needs it: scores, forwards, rows, seconds, and claims in their form."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stretto.bench.measure import Item

__all__ = ["Trial", "adapter_ready", "claims_of", "interleaved", "trial"]


@dataclass(slots=True)
class Trial:
    """What a decoder did with ``items``, in their order."""

    label: str
    items: list[Item] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def scores(self) -> list[float]:
        return [float(i.score(o.outputs[0].text)) for i, o in zip(self.items, self.outputs, strict=True) if i.score]

    @property
    def accuracy(self) -> float:
        return statistics.mean(self.scores)

    @property
    def texts(self) -> list[list[int]]:
        return [o.outputs[0].token_ids for o in self.outputs]

    def total(self, name: str) -> float:
        """Sum of one of the engine's counters."""
        return sum(getattr(o.metrics, name) for o in self.outputs)

    @property
    def tokens_per_forward(self) -> float:
        return self.total("tokens") / self.total("forwards")

    def of(self, family: str) -> Trial:
        """The part of one family of tasks (or one task)."""
        kept = [(i, o) for i, o in zip(self.items, self.outputs, strict=True) if family in (i.family, i.task)]
        return Trial(self.label, [i for i, _ in kept], [o for _, o in kept])

    def row(self) -> dict[str, Any]:
        return {
            "decoder": self.label, "n": len(self.items), "accuracy": round(self.accuracy, 4),
            "tokens_per_forward": round(self.tokens_per_forward, 3),
            "forwards": round(self.total("forwards") / len(self.items), 2),
            "rows_per_token": round(self.total("rows") / self.total("tokens"), 2), "seconds": round(self.seconds, 3),
        }


def trial(
    llm: Any, items: Sequence[Item], method: str, options: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (), *,
    label: str = "", batch: int = 16, max_tokens: int | None = None, temperature: float = 0.0,
) -> Trial:
    """Greedy answers, ``batch`` prompts at a time. ``options``: for all prompts, or one mapping a prompt."""
    from stretto.engine.params import SamplingParams

    out = Trial(label or method, list(items))
    for start in range(0, len(items), batch):
        chunk = items[start : start + batch]
        params = [SamplingParams(max_tokens=max_tokens or i.max_tokens, temperature=temperature) for i in chunk]
        given = dict(options) if isinstance(options, Mapping) else list(options)[start : start + batch] or {}
        begin = time.perf_counter()
        out.outputs += llm.generate([i.prompt for i in chunk], params, method=method, options=given)
        out.seconds += time.perf_counter() - begin
    return out


def interleaved(
    llm: Any, items: Sequence[Item], decoders: Mapping[str, tuple[str, Mapping[str, Any]]], *, rounds: int = 3,
) -> dict[str, float]:
    """Seconds of each decoder for all items one by one: the smallest of ``rounds`` turns taken by turns."""
    best = {name: float("inf") for name in decoders}
    for turn in range(rounds):
        order = list(decoders)[turn % len(decoders) :] + list(decoders)[: turn % len(decoders)]
        for name in order:
            method, options = decoders[name]
            best[name] = min(best[name], trial(llm, items, method, options, batch=1).seconds)
    return best


def claims_of(system: Any, found: Mapping[str, tuple[Any, Any, bool, str]]) -> list[dict[str, Any]]:
    """The rows of ``System.measure`` from name -> (measured, baseline, holds, note). A claim that ``found`` leaves out
    does not hold, and says so."""
    missing = ("not measured", "", False, "")
    return [
        dict(zip(("name", "paper", "measured", "baseline", "bar", "holds", "note"),
                 (c.name, c.paper, m, b, c.bar, bool(h), note), strict=True))
        for c in system.claims for m, b, h, note in [found.get(c.name, missing)]
    ]


def adapter_ready(name: str) -> bool:
    """Whether a part of the zoo is there."""
    from stretto.zoo.models import PARTS

    folder = PARTS[name].folder
    return any((folder / f).exists() for f in ("adapter.json", "adapter_config.json"))
