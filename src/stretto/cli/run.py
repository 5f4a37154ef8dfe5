"""``stretto run MODEL PROMPT``: complete a prompt."""

from __future__ import annotations

import sys
from dataclasses import asdict
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
    parse_pairs,
    verb,
)
from stretto.engine.params import SamplingParams
from stretto.errors import PromptError


@verb
def run(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; '-' or nothing reads stdin.")
    ] = None,
    method: MethodName = "ar",
    option: Options = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Most tokens of the answer.")
    ] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="0 is off.")] = 0,
    min_p: Annotated[float, typer.Option("--min-p", help="0 is off.")] = 0.0,
    seed: Seed = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Stop string; repeatable.")
    ] = None,
    json_schema: Annotated[
        str | None, typer.Option("--json-schema", help="JSON schema that the answer follows.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option("--regex", help="Expression that the answer matches.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template around the prompt.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    deterministic: Deterministic = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Complete a prompt.

    The text streams to stdout; what it cost goes to stderr.
    """
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
        json_schema=json_schema,
        regex=regex,
    )
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    if not text or not text.strip():
        raise PromptError("the prompt is empty: give it as an argument or on stdin")
    llm, method, options = open_llm(
        model, method, parse_pairs(option), dtype, device, threads, deterministic
    )
    if not raw and llm.tokenizer.templates:
        text = llm.chat_prompt([{"role": "user", "content": text}])
    if as_json:
        emit(_result(llm.generate(text, params, method=method, options=options)[0], model, method))
        return
    streams: list[Any] = []
    for piece in llm.stream(text, params, method=method, options=options, seen=streams.append):
        typer.echo(piece, nl=False)
    typer.echo()
    cost(streams[0], method)


def open_llm(
    model: str,
    method: str,
    options: dict[str, str],
    dtype: str,
    device: str,
    threads: int | None,
    deterministic: bool,
) -> tuple[Any, str, dict[str, Any]]:
    """The LLM, and the method with "auto" replaced by what ``stretto tune`` found."""
    from stretto.decoding.registry import get

    chosen: dict[str, Any] = dict(options)
    if method == "auto":
        from stretto.decoding.profiles import resolve_auto

        choice = resolve_auto(model)
        method, chosen = choice.method, {**choice.options, **options}
        typer.echo(choice.note, err=True)
    get(method)
    from stretto.llm import LLM

    llm = LLM(model, dtype=dtype, device=device, threads=threads, deterministic=deterministic)
    return llm, method, chosen


def cost(stream: Any, method: str) -> None:
    """One line on stderr: what the answer cost."""
    m = stream.seq.metrics
    text = (
        f"{method}: {m.tokens} tokens in {m.forwards} forwards "
        f"({m.tokens_per_forward:.2f} per forward), {m.seconds:.2f} s, "
        f"{m.tokens / max(m.seconds, 1e-9):.0f} tokens/s, ended by {stream.finish_reason}"
    )
    typer.echo("\n".join([text, *m.notes]), err=True)


def _result(output: Any, model: str, method: str) -> dict[str, Any]:
    choice = output.outputs[0]
    metrics = asdict(choice.metrics) | {"tokens_per_forward": choice.metrics.tokens_per_forward}
    return {
        "model": model,
        "method": method,
        "text": choice.text,
        "token_ids": choice.token_ids,
        "finish_reason": choice.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "metrics": metrics,
    }
