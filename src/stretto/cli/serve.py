"""``stretto serve MODEL``: every method behind the OpenAI interface."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
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
    Threads,
    emit,
    parse_pairs,
    verb,
)
from stretto.errors import InputError


@verb
def serve(
    model: Model = "zoo:tiny",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 = any free one.")] = 8000,
    name: Annotated[str, typer.Option("--served-model-name", help="What requests call the model.")] = "",
    method: MethodName = "auto",
    option: Options = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", help="Required key, one per tenant; repeatable. Also STRETTO_API_KEY."),
    ] = None,
    max_model_len: Annotated[int | None, typer.Option("--max-model-len", help="Context, in tokens.")] = None,
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", help="Choices that run at the same time.")] = 64,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option("--max-num-batched-tokens", help="Rows of a forward; prompts are cut to it.")
    ] = None,
    kv_cache_tokens: Annotated[int | None, typer.Option("--kv-cache-tokens", help="Slots of the cache.")] = None,
    prefix_caching: Annotated[
        bool, typer.Option("--prefix-caching/--no-prefix-caching", help="Share prefixes.")
    ] = True,
    kv_layout: Annotated[
        str, typer.Option("--kv-layout", help="paged, or slots: a contiguous region a sequence.")
    ] = "paged",
    max_queued_requests: Annotated[
        int, typer.Option("--max-queued-requests", help="Choices that may wait; beyond: 429.")
    ] = 256,
    max_queued_tokens: Annotated[
        int, typer.Option("--max-queued-tokens", help="Prompt tokens that may wait; beyond: 429.")
    ] = 65536,
    max_choices: Annotated[int, typer.Option("--max-choices", help="Largest n of a request.")] = 16,
    max_sessions: Annotated[int, typer.Option("--max-sessions", help="Sessions that may be open.", min=0)] = 16,
    session_timeout: Annotated[
        float, typer.Option("--session-timeout", help="Seconds after which an idle session ends.", min=1.0)
    ] = 300.0,
    max_body: Annotated[int, typer.Option("--max-body", help="Bytes of a body; beyond: 413.")] = 4 << 20,
    timeout: Annotated[
        float | None, typer.Option("--timeout", help="Seconds after which a request is given up.")
    ] = None,
    drain_timeout: Annotated[
        float, typer.Option("--drain-timeout", help="Seconds that SIGTERM waits for answers.")
    ] = 30.0,
    supervise: Annotated[
        int, typer.Option("--supervise", help="Start a dead engine again, so often in ten minutes.")
    ] = 0,
    allow_model: Annotated[
        list[str] | None, typer.Option("--allow-model", help="A model that requests may name in options; repeatable.")
    ] = None,
    online_training: Annotated[
        bool, typer.Option("--online-training", help="Learn a drafter from what is served: method 'online'.")
    ] = False,
    online_share: Annotated[
        float, typer.Option("--online-share", help="Share of one core that training may use.", min=0.01, max=1.0)
    ] = 0.5,
    online_dir: Annotated[
        Path | None, typer.Option("--online-dir", help="Samples and versions (default: temporary).")
    ] = None,
    online_record: Annotated[
        float, typer.Option("--online-record", help="Fraction of texts kept for training.", min=0.0, max=1.0)
    ] = 1.0,
    sync_interval: Annotated[
        int, typer.Option("--sync-interval", help="Training steps between versions.", min=1)
    ] = 40,
    min_gain: Annotated[
        float, typer.Option("--min-gain", help="Tokens a forward that a version must promise.")
    ] = 1.1,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse unknown fields of bodies.")] = False,
    profile: Annotated[Path | None, typer.Option("--profile", help="Profile by 'tune' for method auto.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan/--no-plan", help="Methods may switch themselves off where they do not pay.")
    ] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    deterministic: Deterministic = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's interface.

    /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics; a page to try methods at /.
    """
    from stretto.decoding.profiles import plain_method
    from stretto.serving.server import serve as run
    from stretto.serving.service import Online, Settings

    engine: dict[str, Any] = {
        "dtype": dtype, "device": device, "threads": threads, "deterministic": deterministic,
        "max_model_len": max_model_len, "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens, "kv_cache_tokens": kv_cache_tokens,
        "enable_prefix_caching": prefix_caching, "kv_layout": kv_layout, "plan": plan,
    }
    keys = [*(api_key or []), *filter(None, [os.environ.get("STRETTO_API_KEY")])]
    for key in keys:
        if not key.isascii() or not key.strip() or " " in key:
            raise InputError("an API key must be printable ASCII without blanks")
    settings = Settings(
        model, name, engine, auto=_auto(model, method, parse_pairs(option), profile), plain=plain_method(model),
        api_keys=keys, max_queued_requests=max_queued_requests, max_queued_tokens=max_queued_tokens,
        max_choices=max_choices, max_body=max_body, timeout=timeout, drain_timeout=drain_timeout,
        restarts=supervise, strict=strict, paths=allow_model or (),
        sessions={"most": max_sessions, "idle": session_timeout},
    )
    if not as_json:
        typer.echo(f"stretto serve {model}: loading", err=True)
    with tempfile.TemporaryDirectory(prefix="stretto-online-") as folder:
        if online_training:
            options = {"sync": sync_interval, "min_gain": min_gain}
            settings.online = Online(str(online_dir or folder), online_share, online_record, options)
            if method == "auto":
                settings.auto = ("online", {}, "the drafter that learns while serving")
        code = run(settings, host, port, started=lambda url: _say(url, settings, as_json))
    raise typer.Exit(code)


def _auto(model: str, method: str, options: dict[str, str], profile: Path | None) -> tuple[str, dict[str, Any], str]:
    """What "auto", and a request that names no method, stand for."""
    from stretto.decoding.profiles import resolve_auto
    from stretto.decoding.registry import get

    if method == "auto":
        return tuple(resolve_auto(model, profile))  # type: ignore[return-value]
    return get(method).name, dict(options), f"{get(method).name}: chosen when the server was started"


def _say(url: str, settings: Any, as_json: bool) -> None:
    if as_json:
        emit({"url": url, "model": settings.name or settings.model, "pid": os.getpid(), "auto": settings.auto[0]})
    else:
        typer.echo(f"stretto: {settings.name or settings.model} at {url} (page: {url}/, API: {url}/v1)", err=True)
