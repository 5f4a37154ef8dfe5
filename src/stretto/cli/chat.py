"""``stretto chat MODEL``: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from stretto.cli.common import (
    Config,
    Deterministic,
    Device,
    Dtype,
    Json,
    MethodName,
    Model,
    Options,
    Seed,
    Threads,
    emit,
    fail,
    parse_pairs,
    verb,
)
from stretto.cli.run import cost, open_llm
from stretto.engine.params import SamplingParams
from stretto.errors import StrettoError

HELP = "Type a message. /method NAME changes the method, /reset forgets, /quit leaves."


@verb
def chat(
    model: Model = "zoo:tiny",
    method: MethodName = "ar",
    option: Options = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Most tokens of an answer.")
    ] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    deterministic: Deterministic = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Talk to a model.

    With --json every line of stdin is a message, and one object comes at the end.
    """
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    llm, method, options = open_llm(
        model, method, parse_pairs(option), dtype, device, threads, deterministic
    )
    talk = Conversation(llm, params, method, options, system, quiet=as_json)
    if not as_json:
        typer.echo(HELP, err=True)
    while (text := _read(as_json)) is not None:
        try:
            if text.startswith("/"):
                if not talk.command(text):
                    break
            elif text.strip():
                talk.say(text)
        except StrettoError as error:  # a person goes on, a script stops
            if as_json:
                raise
            fail(error, as_json)
    if as_json:
        emit({"model": model, "turns": talk.turns, "messages": talk.messages})


def _read(as_json: bool) -> str | None:
    try:
        return input("" if as_json else "> ")
    except EOFError:
        return None


class Conversation:
    """The messages so far, and what each answer cost."""

    def __init__(
        self,
        llm: Any,
        params: SamplingParams,
        method: str,
        options: dict[str, Any],
        system: str | None,
        *,
        quiet: bool,
    ):
        self._llm, self._params, self._quiet = llm, params, quiet
        self._method, self._options = method, options
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._start)
        self.turns: list[dict[str, Any]] = []

    def command(self, text: str) -> bool:
        """Obey a line that starts with a slash; False ends the conversation."""
        word, _, rest = text[1:].partition(" ")
        if word in ("quit", "exit", "q"):
            return False
        if word == "reset":
            self.messages = list(self._start)
        elif word == "method" and rest.strip():
            self._llm.method(rest.strip())
            self._method, self._options = rest.strip(), {}
        else:
            typer.echo(HELP, err=True)
        return True

    def say(self, text: str) -> None:
        """Answer a message, streaming, and remember both."""
        messages = [*self.messages, {"role": "user", "content": text}]
        streams: list[Any] = []
        pieces = []
        for piece in self._llm.stream(
            self._llm.chat_prompt(messages),
            self._params,
            method=self._method,
            options=self._options,
            seen=streams.append,
        ):
            pieces.append(piece)
            if not self._quiet:
                sys.stdout.write(piece)
                sys.stdout.flush()
        answer, metrics = "".join(pieces), streams[0].seq.metrics
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.turns.append(
            {
                "text": answer,
                "method": self._method,
                "finish_reason": streams[0].finish_reason,
                "tokens": metrics.tokens,
                "forwards": metrics.forwards,
                "tokens_per_forward": metrics.tokens_per_forward,
                "seconds": metrics.seconds,
            }
        )
        if not self._quiet:
            typer.echo()
            cost(streams[0], self._method)
