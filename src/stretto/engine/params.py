"""Sampling parameters, with vLLM's names; free of torch so that listings and the CLI stay quick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from stretto.errors import OptionError, UnknownNameError

__all__ = ["SamplingParams"]


@dataclass(slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    temperature 0 is greedy (ties: lowest id). ``seed`` None means 0: results are reproducible unless the caller
    varies the seed. Choice i of ``n`` draws its own random numbers, keyed by (seed, i, index of the token).
    ``logprobs`` k returns, per token, the log-probabilities of the chosen and the k most likely tokens under
    the model's unprocessed law. ``regex`` and ``json_schema`` constrain the text (extra: grammar).

    Raises OptionError, naming the field and what is allowed.
    """

    n: int = 1
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    regex: str | None = None
    json_schema: dict[str, Any] | str | None = None
    skip_special_tokens: bool = True

    @classmethod
    def make(cls, **values: Any) -> SamplingParams:
        """Build from loose keys; an unknown key is refused with the nearest name."""
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise UnknownNameError("sampling parameter", key, known)
        return cls(**values)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        self.stop = list(self.stop or [])
        self.stop_token_ids = list(self.stop_token_ids or [])
        if self.top_k == -1:
            self.top_k = 0
        self._whole("n", 1, 1024)
        self._whole("max_tokens", 1, 1 << 24)
        self._whole("min_tokens", 0, self.max_tokens)
        self._whole("top_k", 0, 1 << 24)
        self._real("temperature", 0.0, 100.0)
        self._real("top_p", 0.0, 1.0, open_low=True)
        self._real("min_p", 0.0, 1.0)
        self._real("presence_penalty", -2.0, 2.0)
        self._real("frequency_penalty", -2.0, 2.0)
        self._real("repetition_penalty", 0.0, 100.0, open_low=True)
        if self.logprobs is not None:
            self._whole("logprobs", 0, 100)
        if self.seed is not None:
            self._whole("seed", -(1 << 63), (1 << 63) - 1)
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise OptionError("stop", self.stop, "non-empty strings")
        if self.regex is not None and self.json_schema is not None:
            raise OptionError("regex", self.regex, "regex or json_schema, not both")
        self._check_bias()

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        try:
            self.logit_bias = {int(k): float(v) for k, v in self.logit_bias.items()}
        except (AttributeError, TypeError, ValueError):
            raise OptionError("logit_bias", self.logit_bias, "a map of token id to number") from None

    def _whole(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise OptionError(name, value, f"a whole number from {low} to {high}")

    def _real(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not ok or value > high or value < low or (open_low and value == low):
            bound = "above" if open_low else "from"
            raise OptionError(name, value, f"a number {bound} {low:g} to {high:g}")
