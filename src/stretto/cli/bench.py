"""``stretto bench MODEL``: every method against plain decoding, in one run. ``stretto bench URL``: load on a server."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from stretto.cli.common import (
    Config,
    Device,
    Dtype,
    Json,
    Seed,
    Tasks,
    Threads,
    emit,
    parse_pairs,
    progress,
    split_names,
    verb,
)
from stretto.errors import OptionError


@verb
def bench(
    model: Annotated[
        str, typer.Argument(help="zoo:NAME, a directory, a hub id; or http://HOST:PORT of a server.")
    ] = "zoo:tiny",
    methods: Annotated[
        str, typer.Option("--methods", help="Methods, comma-separated; 'all'.")
    ] = "all",
    tasks: Tasks = "",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="METHOD.KEY=VALUE", help="Option of a method."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute, wider spreads.")] = False,
    samples: Annotated[int | None, typer.Option("--samples", help="Prompts a task.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Prompts decoded at the same time.")] = 1,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report here.")] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also transformers and llama.cpp, where installed.")
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep", metavar="DECODERS",
            help="Score over tokens per forward: 'threshold:0.5,0.9;static:1,4;freedave:8;ar', or 'card'.",
        ),
    ] = None,
    only_peers: Annotated[
        bool, typer.Option("--only-peers", help="Peers alone, with the bars; kept in evidence/peers.json.")
    ] = False,
    servers: Annotated[
        bool, typer.Option("--servers", help="Other servers beside 'stretto serve'; kept in evidence/servers.json.")
    ] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Not deterministic: 'equal' is then a share.")
    ] = False,
    requests: Annotated[int, typer.Option("--requests", help="URL: requests to send.")] = 64,
    rate: Annotated[float, typer.Option("--rate", help="URL: requests a second; 0 = all together.")] = 4.0,
    arrivals: Annotated[
        str, typer.Option("--arrivals", help="URL: poisson, fixed or together.")
    ] = "poisson",
    concurrency: Annotated[int, typer.Option("--concurrency", help="URL: most at once; 0 = any.")] = 0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="URL: tokens of an answer.")] = 64,
    limit: Annotated[
        list[str] | None,
        typer.Option("--limit", metavar="ttft|tpot|e2e=MS", help="URL: limits of the goodput."),
    ] = None,
    name: Annotated[str, typer.Option("--model-name", help="URL: the model to ask for.")] = "",
    prompts: Annotated[Path | None, typer.Option("--prompts", help="URL: a file, one prompt a line.")] = None,
    api_key: Annotated[str, typer.Option("--api-key", envvar="STRETTO_API_KEY", help="URL: the key.")] = "",
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Measure methods side by side, or the latencies of a server.

    MODEL: speed-up, tokens per forward, share of the same text, quality. URL: TTFT, TPOT, ITL, E2E, goodput.
    """
    if model.startswith(("http://", "https://")):
        load = {
            "requests": requests, "rate": rate, "arrivals": arrivals, "concurrency": concurrency,
            "max_tokens": max_tokens, "limits": _limits(limit), "seed": seed, "body": _body(methods, option),
        }
        _load(model, load, name, prompts, split_names(tasks), api_key, html, as_json)
        return
    if only_peers or servers:
        return _beside_others("servers" if servers else "peers", quick, threads, as_json)
    if not as_json:
        typer.echo(f"stretto bench {model}: loading", err=True)
    if sweep is not None:
        _sweep(model, sweep, tasks, samples, html, seed, quick, as_json)
        return
    from stretto.bench.runner import bench as measure

    with progress(as_json) as report:
        result = measure(
            model,
            split_names(methods),
            ["all"] if tasks == "all" else split_names(tasks),
            quick=quick,
            samples=samples,
            batch=batch,
            html=html,
            peers=peers,
            seed=seed,
            threads=threads,
            dtype=dtype,
            device=device,
            deterministic=not fast,
            options=_options(option),
            progress=report,
        )
    if as_json:
        emit(result)
        return
    from stretto.bench.table import print_rows

    print_rows(result)


def _load(
    url: str, load: dict[str, Any], name: str, prompts: Path | None, tasks: list[str], key: str,
    html: Path | None, as_json: bool,
) -> None:
    from stretto.bench.load import Load, run_load
    from stretto.bench.load_report import print_load, write_load

    given = prompts.read_text(encoding="utf-8").splitlines() if prompts else None
    with progress(as_json) as report:
        result = run_load(
            url, Load(**load), model=name, prompts=given, tasks=tasks, key=key, progress=report
        )
    if html is not None:
        write_load(result, html)
    if as_json:
        emit(result)
    else:
        print_load(result)


def _body(methods: str, option: list[str] | None) -> dict[str, Any]:
    """Fields of every request: the method to ask for, where one is named."""
    names = split_names(methods)
    if len(names) > 1:
        raise OptionError("--methods", methods, "one method for a server: run it once for each")
    if not names:
        return {}
    return {"method": names[0], "options": _options(option).get(names[0], {})}


def _limits(pairs: list[str] | None) -> dict[str, float]:
    out = {}
    for key, value in parse_pairs(pairs).items():
        try:
            out[key] = float(value)
        except ValueError:
            raise OptionError("--limit", f"{key}={value}", "milliseconds") from None
    return out


def _sweep(
    model: str, decoders: str, tasks: str, samples: int | None, html: Path | None, seed: int, quick: bool, as_json: bool
) -> None:
    from stretto.bench.parallelbench import print_sweep, sweep_model

    with progress(as_json) as report:
        result = sweep_model(
            model, decoders, split_names(tasks), samples=samples or (4 if quick else 25), seed=seed, progress=report
        )
    if html is not None:
        from stretto.bench.parallel_plot import sweep_page
        from stretto.bench.provenance import write_atomically

        write_atomically(html, sweep_page(result))
    if as_json:
        emit(result)
    else:
        print_sweep(result)


def _beside_others(what: str, quick: bool, threads: int | None, as_json: bool) -> None:
    from stretto.bench.peers import measure_peers
    from stretto.bench.provenance import write_json
    from stretto.bench.servers import measure_servers
    from stretto.bench.table import print_peers
    from stretto.systems import evidence_folder

    measure = measure_servers if what == "servers" else measure_peers
    with progress(as_json) as report:
        say = report and partial(report, 0.0)
        result = measure(quick=quick, threads=threads, progress=say)
    path = None if quick else str(write_json(evidence_folder() / f"{what}.json", result))
    if as_json:
        emit({**result, "evidence": path})
    else:
        print_peers(result)
        typer.echo(f"evidence: {path or 'none: a quick run is not evidence'}")


def _options(pairs: list[str] | None) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for pair in pairs or ():
        name, sep, value = pair.partition("=")
        method, dot, key = name.partition(".")
        if not sep or not dot:
            raise OptionError("-o", pair, "METHOD.KEY=VALUE")
        out.setdefault(method, {})[key] = value
    return out
