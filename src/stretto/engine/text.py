"""Where an output ends: stop tokens, stop strings across token borders, max_tokens; and what may be streamed."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from stretto.engine.params import SamplingParams

__all__ = ["Cut", "StopChecker", "TextDecoder"]


class TextDecoder(Protocol):
    """Turns tokens into text bit by bit, never half a character (models/tokenizer.py has it)."""

    def push(self, ids: Seq[int]) -> str: ...

    def flush(self) -> str: ...


@dataclass(slots=True, frozen=True)
class Cut:
    """``keep`` of the new tokens are final; ``reason`` says why the sequence ends, if it does."""

    keep: int
    reason: str | None = None
    stop: str | int | None = None


class StopChecker:
    """Reads the final tokens of one sequence in order. Needs a decoder only for stop strings.

    ``text`` is the output text so far, a stop string already taken out; ``safe`` is how much of it can never change
    any more (the rest may be the beginning of a stop string).
    """

    def __init__(self, params: SamplingParams, stop_ids: Seq[int], decoder: TextDecoder | None):
        self.text = ""
        self._params, self._decoder = params, decoder
        self._ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            self._ids |= set(stop_ids)
        self._holdback = max((len(s) for s in params.stop or ()), default=1) - 1
        self._done = False

    @property
    def reads(self) -> bool:
        """Whether tokens are turned into text."""
        return self._decoder is not None

    @property
    def safe(self) -> int:
        return len(self.text) if self._done else max(0, len(self.text) - self._holdback)

    def check(self, tokens: Seq[int], generated: int) -> Cut:
        """``generated``: tokens of the output before these."""
        p = self._params
        room = p.max_tokens - generated
        for i, token in enumerate(tokens[:room]):
            if token in self._ids and generated + i >= p.min_tokens:
                return self._end(Cut(i + 1, "stop", token if token in p.stop_token_ids else None))
            if self._decoder is not None:
                start = max(0, len(self.text) - self._holdback)
                self.text += self._decoder.push([token])
                hit = self._hit(start) if generated + i + 1 >= p.min_tokens else None
                if hit is not None:
                    return self._end(Cut(i + 1, "stop", hit))
        if len(tokens) >= room:
            return self._end(Cut(room, "length"))
        return Cut(len(tokens))

    def finish(self) -> str:
        """The whole text, at the end of the sequence."""
        if not self._done:
            self._end(Cut(0))
        return self.text

    def _end(self, cut: Cut) -> Cut:
        self._done = True
        if self._decoder is not None and not isinstance(cut.stop, str):
            self.text += self._decoder.flush()
        return cut

    def _hit(self, start: int) -> str | None:
        found = [(self.text.find(s, start), s) for s in self._params.stop or ()]
        found = [(at, s) for at, s in found if at >= 0]
        if not found:
            return None
        at, stop = min(found)
        self.text = self.text[: at + (len(stop) if self._params.include_stop_str_in_output else 0)]
        return stop
