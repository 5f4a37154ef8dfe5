"""``stretto chat MODEL``: a conversation in the terminal."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stretto.cli.common import Deterministic, Device, Dtype, Json, MethodName, Options, Threads, emit, parse_pairs, verb
from stretto.cli.run import cost, open_llm
from stretto.engine.params import SamplingParams

HELP = "Type a message. /method NAME changes the method, /reset forgets the conversation, /quit leaves."


@verb
def chat(
    model: Annotated[str, typer.Argument(help="zoo:NAME, a directory, or a hub id.")] = "zoo:tiny",
    method: MethodName = "ar",
    option: Options = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    dtype: Dtype = "auto", device: Device = "auto", threads: Threads = None, deterministic: Deterministic = False,
    as_json: Json = False,
) -> None:
    """Talk to a model; with --json every line of stdin is a message and every answer an object."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    llm, method, options = open_llm(model, method, parse_pairs(option), dtype, device, threads, deterministic)
    start = [{"role": "system", "content": system}] if system else []
    messages: list[dict[str, str]] = list(start)
    if not as_json:
        typer.echo(HELP, err=True)
    while (text := _read(as_json)) is not None:
        if text.startswith("/"):
            word, _, rest = text[1:].partition(" ")
            if word in ("quit", "exit", "q"):
                return
            if word == "reset":
                messages = list(start)
            elif word == "method" and rest.strip():
                llm.method(rest.strip())
                method, options = rest.strip(), {}
            else:
                typer.echo(HELP, err=True)
            continue
        if text.strip():
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": _answer(llm, messages, params, method, options, as_json)})


def _read(as_json: bool) -> str | None:
    try:
        return input("" if as_json else "> ")
    except EOFError:
        return None


def _answer(
    llm: Any, messages: list[dict[str, str]], params: SamplingParams, method: str, options: Any, as_json: bool
) -> str:
    seen: list[Any] = []
    pieces = []
    for piece in llm.stream(llm.chat_prompt(messages), params, method=method, options=options, seen=seen.append):
        pieces.append(piece)
        if not as_json:
            typer.echo(piece, nl=False)
    text = "".join(pieces)
    if as_json:
        metrics = seen[0].seq.metrics
        emit({"text": text, "forwards": metrics.forwards, "tokens_per_forward": metrics.tokens_per_forward})
    else:
        typer.echo()
        cost(seen[0], method)
    return text
