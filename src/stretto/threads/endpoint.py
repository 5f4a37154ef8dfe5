"""An OpenAI-style endpoint of completions as a place where token ids are completed: ``stretto serve``, vLLM.

Prompts go as ids and answers must come back as ids (vLLM's ``return_token_ids``): text that is tokenized again is not
what the model wrote. An endpoint that cannot do it is refused, with what to do; nothing is guessed from text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from stretto.engine.params import SamplingParams
from stretto.errors import EngineError, OptionError, UnsupportedError
from stretto.threads.ask import ask

__all__ = ["Completion", "Endpoint"]

Completion = tuple[list[int], str]  # ids with the token that ended them; "stop" or "length"
NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class Endpoint:
    """``url``: with or without ``/v1``. ``ends``: ids that end a text. Raises OptionError for an address that is none,
    OSError where nobody answers, EngineError for an answer that says so, UnsupportedError for an endpoint of texts."""

    def __init__(
        self, url: str, params: SamplingParams, ends: Sequence[int], *, model: str | None = None,
        api_key: str | None = None, timeout: float = 600.0, max_model_len: int | None = None,
    ):
        if not url.startswith(("http://", "https://")):
            raise OptionError("backend", url, "local, or the http:// address of an endpoint of completions")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.params, self.ends, self.timeout, self._key = params, set(ends), timeout, api_key
        self._model, self._longest = model, max_model_len
        self.calls = 0

    def complete(self, prompts: Sequence[Sequence[int]], stops: Sequence[int], room: int) -> list[Completion]:
        """One completion for every prompt, all under way at once."""
        _ = self.model
        first, self.calls = self.calls, self.calls + len(prompts)
        bodies = [self._body(p, stops, room, first + i) for i, p in enumerate(prompts)]
        if len(bodies) == 1:
            return [self._checked(bodies[0], self._post("/completions", bodies[0]))]
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = list(pool.map(lambda b: self._post("/completions", b), bodies))
        return [self._checked(b, a) for b, a in zip(bodies, answers, strict=True)]

    @property
    def model(self) -> str:
        return self._model or self._served["id"]

    @property
    def max_model_len(self) -> int:
        longest = self._longest or self._served.get("max_model_len")
        if not longest:
            raise OptionError("max_model_len", None, f"a number: {self.url}/models does not tell the longest context")
        return int(longest)

    @cached_property
    def _served(self) -> Mapping[str, Any]:
        found = self._post("/models", None).get("data") or [{}]
        named = [m for m in found if self._model in (None, m.get("id"))]
        if not named or "id" not in named[0]:
            raise OptionError("model", self._model, f"one of {[m.get('id') for m in found]}")
        return named[0]

    def _body(self, prompt: Sequence[int], stops: Sequence[int], room: int, number: int) -> dict[str, Any]:
        p = self.params
        return {
            "model": self.model, "prompt": list(prompt), "max_tokens": room, "stop_token_ids": list(stops),
            "skip_special_tokens": False, "return_token_ids": True, "seed": _seed(p.seed, number),
            **{name: getattr(p, name) for name in NAMES},
        }

    def _post(self, path: str, body: dict[str, Any] | None) -> Any:
        return ask(self.url + path, body, key=self._key, timeout=self.timeout)

    def _checked(self, body: dict[str, Any], answer: Any) -> Completion:
        """The ids of an answer, if they are the model's own."""
        try:
            choice = answer["choices"][0]
            ids, reason = choice.get("token_ids"), choice["finish_reason"]
        except (KeyError, IndexError, TypeError, AttributeError):
            raise EngineError(f"{self.url} answered no completion: {str(answer)[:200]}") from None
        if not isinstance(ids, list):
            raise self._refused("it gives no token_ids: it answers with text only")
        sent = choice.get("prompt_token_ids")
        if sent is not None and sent != body["prompt"]:
            raise self._refused("it tokenized the prompt again: its prompt_token_ids are not those that were sent")
        ending = {*body["stop_token_ids"], *self.ends}
        if reason == "stop" and (not ids or ids[-1] not in ending):
            raise self._refused("it stopped, and its last token is none of those to stop at: it strips them")
        if any(t in ending for t in ids[:-1]):
            raise self._refused("it went on behind a token to stop at: it does not know stop_token_ids")
        if not ids:
            raise EngineError(f"{self.url} generated nothing (finish_reason {reason!r})")
        return [int(t) for t in ids], "stop" if ids[-1] in ending else "length"

    def _refused(self, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.url} cannot serve threads: {why}. Use an endpoint that takes and returns token ids (stretto serve, "
            "vLLM 0.10.2 or newer: prompt as ids, return_token_ids, stop_token_ids), or backend=\"local\""
        )


def _seed(seed: int | None, number: int) -> int | None:
    """Another one for each completion, so that threads of one prompt draw different numbers."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=7).digest(), "big")
