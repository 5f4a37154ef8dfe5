"""What plays an agent: threads of one engine, or OpenAI-compatible endpoints. Both are asked the same text.

An engine's agents share one session: the common prompt is evaluated once, every call is a fork of it, and all calls
that are under way decode in the same forwards. An endpoint gets the same text as one user message, in a thread of its
own.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from stretto.engine.params import SamplingParams
from stretto.errors import EngineError, InputError, OptionError, StrettoError
from stretto.threads.ask import ask

__all__ = ["Agent", "Endpoint", "EngineAgent", "Reply", "agents_of", "worth_retrying"]


@dataclass(frozen=True, slots=True)
class Reply:
    """``evaluated``: tokens that were computed for it, where known (a shared prompt counts in no reply)."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None
    evaluated: int | None = None


class Agent(Protocol):
    """``open`` before the first call of an orchestration, ``close`` after the last."""

    name: str

    def open(self, common: str) -> None: ...

    def close(self) -> None: ...

    def fits(self, text: str, tokens: int) -> bool:
        """Whether ``text`` and an answer of ``tokens`` fit in the context."""
        ...

    async def ask(self, text: str, *, max_tokens: int, seed: int) -> Reply:
        """Answer ``common`` + ``text``. Raises StrettoError; an InputError is not worth a second try."""
        ...


@dataclass
class EngineAgent:
    """Threads of ``llm``. ``params``: temperature and the like; max_tokens and seed are set by each call."""

    llm: Any
    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    method: str = "ar"
    options: Mapping[str, Any] | None = None
    max_threads: int = 64

    def __post_init__(self) -> None:
        self.name, self.head = str(self.llm.model_name), []
        self._session: Any = None

    def prompt(self, text: str) -> str:
        """The whole prompt of a call."""
        content = f"{self._common}\n{text}" if self._common else text
        return self.llm.chat_prompt([{"role": "user", "content": content}])

    def open(self, common: str) -> None:
        self._common = common
        encode = self.llm.tokenizer.encode
        # What two different calls have in common: a token may reach over the end of the common prompt.
        one, two = encode(self.prompt("0")), encode(self.prompt("x"))
        shared = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        self.head = one[:shared]
        self._session = self.llm.session(self.head, max_threads=self.max_threads) if self.head else None

    def capped(self, tokens: int) -> SamplingParams:
        """The parameters of a call whose answer may have ``tokens``."""
        return replace(self.params, n=1, max_tokens=tokens)

    def close(self) -> None:
        if self._session is not None:
            self._session.end()
            self._session = None

    @property
    def usage(self) -> Any:
        """The session's account, while it is open."""
        return self._session.usage

    def fits(self, text: str, tokens: int) -> bool:
        return len(self.llm.tokenizer.encode(self.prompt(text))) + tokens <= self.llm.max_model_len

    async def ask(self, text: str, *, max_tokens: int, seed: int) -> Reply:
        ids = self.llm.tokenizer.encode(self.prompt(text))
        room = self.llm.max_model_len - len(ids)
        if room < 1:
            raise InputError(f"a call of {len(ids)} tokens does not fit in {self.llm.max_model_len}: pass on less")
        params = replace(self.capped(min(max_tokens, room)), seed=seed)
        n, session = len(self.head), self._session
        if session is None or ids[:n] != self.head or len(ids) == n:
            raise EngineError(f"the prompt of {self.name} does not begin with the common prompt: a bug in its template")
        (thread,) = session.fork(prefixes=[ids[n:]])
        try:
            out = await thread.agen(params, method=self.method, options=self.options)
        finally:
            thread.end()
        return Reply(out.text, len(ids), len(out.token_ids), out.finish_reason, out.metrics.rows)

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [n, H]: the mean of the model's own token embeddings."""
        encode, embed = self.llm.tokenizer.encode, self.llm.model.embed
        with torch.no_grad():
            rows = [embed(torch.tensor(encode(t) or [0], device=self.llm.model.device)).float().mean(0) for t in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


@dataclass
class Endpoint:
    """A server that speaks OpenAI's chat completions at ``url`` (".../v1"). ``extra``: more fields of the body;
    ``context``: tokens that fit, estimated at three characters each."""

    url: str
    model: str
    key: str | None = None
    timeout: float = 60.0
    context: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise OptionError("url", self.url, "an address that begins with http:// or https://")
        self.name, self._common = f"{self.model}@{self.url}", ""

    def open(self, common: str) -> None:
        self._common = common

    def close(self) -> None:
        pass

    def fits(self, text: str, tokens: int) -> bool:
        chars = len(self._common) + len(text)
        return self.context is None or math.ceil(chars / 3) + tokens <= self.context

    async def ask(self, text: str, *, max_tokens: int, seed: int) -> Reply:
        content = f"{self._common}\n{text}" if self._common else text
        body = {
            "model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens,
            "temperature": 0.0, "seed": seed, **self.extra,
        }
        found = await asyncio.to_thread(self._post, body)
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            return Reply(
                choice["message"]["content"] or "", int(usage.get("prompt_tokens", 0)),
                int(usage.get("completion_tokens", 0)), choice.get("finish_reason"),
            )
        except (KeyError, IndexError, TypeError) as e:
            raise EngineError(f"{self.url} answered with something that is no chat completion: {found!r:.200}") from e

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url.rstrip('/')}/chat/completions"
        try:
            return ask(url, body, key=self.key, timeout=self.timeout)
        except OSError as e:  # no connection, time out
            raise EngineError(f"{self.name} cannot be asked: {e}") from e


def agents_of(given: Any) -> list[Agent]:
    """One agent or several, of an LLM, an Endpoint, any Agent, or a list of them."""
    items = list(given) if isinstance(given, (list, tuple)) else [given]
    if not items:
        raise OptionError("agents", given, "an LLM, an Endpoint, or a list of them")
    out: list[Agent] = []
    for item in items:
        if hasattr(item, "session") and hasattr(item, "tokenizer"):
            item = EngineAgent(item)
        if not hasattr(item, "ask"):
            raise OptionError("agents", item, "an LLM, an Endpoint, or a list of them")
        out.append(item)
    return out


def worth_retrying(error: BaseException) -> bool:
    """Whether a second try may help: not where the request itself is at fault."""
    return isinstance(error, (TimeoutError, StrettoError)) and not isinstance(error, InputError)
