"""Grammar-constrained output by llguidance (extra: grammar): JSON schema and regular expressions.

The constraint is read along the path that becomes final: a method that commits several tokens at once asks for the mask
behind each of them in turn. A method that does not commit from left to right declares ``grammar = False``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stretto.engine.params import SamplingParams
from stretto.engine.sampling import Constraint
from stretto.errors import MissingExtraError, OptionError

__all__ = ["compile_constraint"]

JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes


class _Grammar:
    """llguidance's matcher for one sequence. ``tokens`` on a path are consumed and rolled back."""

    def __init__(self, matcher: Any, vocabulary: int, stop_ids: Seq[int]):
        self._matcher, self._n, self._stop_ids = matcher, vocabulary, list(stop_ids)

    def mask(self, path: Seq[int]) -> Tensor:
        matcher = self._matcher
        taken = 0 if matcher.is_stopped() else matcher.try_consume_tokens([int(t) for t in path])
        try:
            if taken < len(path) or matcher.is_stopped():
                return self._only_stop()
            bits = matcher.compute_bitmask()
        finally:
            if taken:
                matcher.rollback(taken)
        flags = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: self._n]
        if self._stop_ids and flags[self._stop_ids[0]]:  # the text may end here: with any token that ends it
            flags[self._stop_ids] = 1
        return torch.from_numpy(np.pad(flags, (0, self._n - len(flags))).astype(bool))

    def advance(self, tokens: Seq[int]) -> None:
        if not self._matcher.is_stopped():
            self._matcher.try_consume_tokens([int(t) for t in tokens])

    def _only_stop(self) -> Tensor:
        out = torch.zeros(self._n, dtype=torch.bool)
        out[self._stop_ids] = True
        return out


def compile_constraint(
    tokenizer: Any, params: SamplingParams, stop_ids: Seq[int], vocabulary: int
) -> Callable[[], Constraint]:
    """A maker of constraints for the choices of one request.

    ``tokenizer``: models.tokenizer.Tokenizer. Raises MissingExtraError without llguidance, OptionError for a
    schema or expression that cannot be compiled, with the compiler's reason.
    """
    try:
        import llguidance
    except ImportError:
        raise MissingExtraError("llguidance", "grammar") from None
    name, value = ("regex", params.regex) if params.regex is not None else ("json_schema", params.json_schema)
    try:
        if name == "regex":
            grammar = llguidance.LLMatcher.grammar_from_regex(value)
        else:
            schema = json.loads(value) if isinstance(value, str) else value
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=JSON_STYLE)
        shared = _vocabulary(tokenizer, llguidance, stop_ids)
        probe = llguidance.LLMatcher(shared, grammar)
    except (ValueError, TypeError) as e:
        raise OptionError(name, value, f"something that llguidance can compile ({e})") from None
    if probe.get_error():
        raise OptionError(name, value, f"something that llguidance can compile ({probe.get_error()})")
    ends = [*stop_ids, *(params.stop_token_ids or ())]
    return lambda: _Grammar(llguidance.LLMatcher(shared, grammar), vocabulary, ends)


def _vocabulary(tokenizer: Any, llguidance: Any, stop_ids: Seq[int]) -> Any:
    """llguidance's view of the vocabulary, built once per tokenizer."""
    if getattr(tokenizer, "_guidance", None) is None:
        text = tokenizer.inner.to_str()
        tokenizer._guidance = llguidance.LLTokenizer(text, eos_token=stop_ids[0] if stop_ids else None)
    return tokenizer._guidance
