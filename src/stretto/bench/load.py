"""``stretto bench URL``: load on any OpenAI-compatible server, with latencies as a client sees them.

Terms: TTFT = from sending a request to its first text; ITL = between two pieces of text; TPOT = from the first text to
the last, by the tokens behind the first; E2E = the whole request. Goodput counts requests that met every limit given. A
method that finishes several tokens at once sends pieces of several tokens: its TPOT falls below its ITL.
Free of torch, and of any HTTP library: one socket a request, so that what is measured is the server.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from stretto.bench.provenance import provenance
from stretto.errors import InputError, OptionError
from stretto.zoo.workbook import examples, tasks_of

__all__ = ["Load", "Shot", "arrivals", "fire", "run_load", "summary"]

ARRIVALS = ("poisson", "fixed", "together")


@dataclass(slots=True)
class Shot:
    """One request as its client saw it. Times in seconds since the start of the run; ``pieces``: when text came."""

    planned: float
    sent: float = 0.0
    pieces: list[float] = field(default_factory=list)
    ended: float = 0.0
    tokens: int = 0
    prompt: int = 0
    status: int = 0
    error: str | None = None
    text: str = ""
    cost: dict[str, Any] | None = None

    @property
    def ttft(self) -> float:
        return self.pieces[0] - self.sent

    @property
    def e2e(self) -> float:
        return self.ended - self.sent

    @property
    def tpot(self) -> float | None:
        return (self.pieces[-1] - self.pieces[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.pieces, self.pieces[1:], strict=False)]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent. ``rate``: requests a second (0: all together); ``concurrency``: most at once (0: no limit);
    ``limits``: milliseconds by "ttft", "tpot", "e2e" for the goodput; ``body``: more fields of every request."""

    requests: int = 64
    rate: float = 4.0
    arrivals: str = "poisson"
    concurrency: int = 0
    max_tokens: int = 64
    seed: int = 0
    limits: Mapping[str, float] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 300.0

    def __post_init__(self) -> None:
        if self.arrivals not in ARRIVALS:
            raise OptionError("arrivals", self.arrivals, f"one of {', '.join(ARRIVALS)}")
        if self.requests < 1:
            raise OptionError("requests", self.requests, "a whole number from 1")
        if self.rate < 0 or not math.isfinite(self.rate):
            raise OptionError("rate", self.rate, "requests a second, from 0")
        for name in self.limits:
            if name not in ("ttft", "tpot", "e2e"):
                raise OptionError("limit", name, "ttft, tpot or e2e, in milliseconds")


def arrivals(load: Load) -> list[float]:
    """When each request is due, in seconds: gaps are exponential (poisson) or equal (fixed); the same for a seed."""
    if load.arrivals == "together" or not load.rate:
        return [0.0] * load.requests
    rng, at, out = random.Random(load.seed), 0.0, []
    for _ in range(load.requests):
        out.append(at)
        at += rng.expovariate(load.rate) if load.arrivals == "poisson" else 1 / load.rate
    return out


def prompts_of(load: Load, given: Sequence[str] | None, tasks: Sequence[str]) -> list[str]:
    """As many prompts as requests: those given, in turn, or the workbook's test split."""
    if given:
        return [given[i % len(given)] for i in range(load.requests)]
    chosen = tasks_of(list(tasks))
    each = -(-load.requests // len(chosen))
    pools = [examples(task.name, "test", each, load.seed) for task in chosen]
    return [pools[i % len(pools)][i // len(pools)].prompt for i in range(load.requests)]


def run_load(
    url: str, load: Load, *, model: str = "", prompts: Sequence[str] | None = None, tasks: Sequence[str] = (),
    key: str = "", progress: Callable[[float, str], None] | None = None,
) -> dict[str, Any]:
    """Send the load; what came back. InputError when there is no server at ``url``."""
    model = model or asyncio.run(Target(url, key).first_model())
    shots = fire(url, load, prompts_of(load, prompts, tasks), model=model, key=key, progress=progress)
    return {"url": url, "model": model, **summary(shots, load), "provenance": provenance(seed=load.seed)}


def fire(
    url: str, load: Load, texts: Sequence[str], *, model: str, key: str = "",
    progress: Callable[[float, str], None] | None = None,
) -> list[Shot]:
    """Send ``texts``, one a request; what each client saw, in their order."""
    return asyncio.run(_fire(Target(url, key), load, texts, model, progress))


async def _fire(
    target: Target, load: Load, texts: Sequence[str], model: str, progress: Callable[[float, str], None] | None
) -> list[Shot]:
    shots = [Shot(at) for at in arrivals(load)]
    gate = asyncio.Semaphore(load.concurrency or load.requests)
    start, done = time.perf_counter(), 0

    async def one(shot: Shot, text: str) -> None:
        nonlocal done
        await asyncio.sleep(max(0.0, shot.planned - (time.perf_counter() - start)))
        body = {
            "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": load.max_tokens,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **load.body,
        }
        async with gate:
            shot.sent = time.perf_counter() - start
            try:
                await asyncio.wait_for(target.stream(body, shot, start), load.timeout)
            except (OSError, ValueError, TimeoutError, EOFError) as error:
                shot.error = shot.error or f"{type(error).__name__}: {error}"[:200]
            shot.ended = time.perf_counter() - start
        done += 1
        if progress is not None:
            progress(done / load.requests, f"{done} of {load.requests} requests")

    await asyncio.gather(*[one(s, t) for s, t in zip(shots, texts, strict=True)])
    return shots


def summary(shots: Sequence[Shot], load: Load) -> dict[str, Any]:
    """Figures over the requests that were answered; what failed is counted by reason. Times in milliseconds."""
    good = [s for s in shots if s.error is None and s.pieces]
    span = max((s.ended for s in shots), default=0.0) - min((s.sent for s in shots), default=0.0)
    tokens = sum(s.tokens for s in good)
    met = sum(_meets(s, load.limits) for s in good)
    costs = [s.cost for s in good if s.cost]
    out: dict[str, Any] = {
        "requests": len(shots), "completed": len(good), "failed": len(shots) - len(good),
        "errors": dict(Counter(s.error or "no text" for s in shots if s not in good)),
        "arrivals": load.arrivals if load.rate else "together", "rate": load.rate, "concurrency": load.concurrency,
        "body": dict(load.body), "seconds": span, "requests_per_second": _per(len(good), span),
        "tokens": tokens, "tokens_per_second": _per(tokens, span), "prompt_tokens": sum(s.prompt for s in good),
        "ttft_ms": _spread([s.ttft for s in good]),
        "tpot_ms": _spread([s.tpot for s in good if s.tpot is not None]),
        "itl_ms": _spread([g for s in good for g in s.gaps]), "e2e_ms": _spread([s.e2e for s in good]),
        "limits_ms": dict(load.limits), "goodput": _per(met, span) if load.limits else None,
        "met": met if load.limits else None,
        "timeline": [[round(x, 4) for x in (s.planned, s.sent, s.pieces[0], s.ended)] for s in good],
    }
    if costs:
        forwards = sum(c["forwards"] for c in costs)
        out["tokens_per_forward"] = tokens / forwards if forwards else None
    return out


def _meets(shot: Shot, limits: Mapping[str, float]) -> bool:
    found = {"ttft": shot.ttft, "tpot": shot.tpot or 0.0, "e2e": shot.e2e}
    return all(1000 * found[name] <= most for name, most in limits.items())


def _per(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, median, 90th and 99th percentile (nearest rank), most; in milliseconds."""
    if not values:
        return None
    v = sorted(1000 * x for x in values)

    def rank(q: float) -> float:
        return v[min(len(v) - 1, max(0, math.ceil(q * len(v)) - 1))]

    return {"mean": sum(v) / len(v), "median": rank(0.5), "p90": rank(0.9), "p99": rank(0.99), "max": v[-1]}


class Target:
    """A server by its address: HTTP/1.1 on a socket a request."""

    def __init__(self, url: str, key: str = ""):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url!r} is no address of a server: give http://HOST:PORT")
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._key, self.url = key, url

    async def first_model(self) -> str:
        status, lines, close = await self._open("GET", "/v1/models", None)
        try:
            data = json.loads("".join([line async for line in lines]))
            return data["data"][0]["id"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise InputError(f"{self.url} answers /v1/models with status {status} and no model: give --model") from None
        finally:
            close()

    async def stream(self, body: Mapping[str, Any], shot: Shot, start: float) -> None:
        """Send a request; what comes back is written into ``shot``."""
        shot.status, lines, close = await self._open("POST", "/v1/chat/completions", json.dumps(body).encode())
        try:
            if shot.status != 200:
                text = "".join([line async for line in lines])
                shot.error = f"status {shot.status}: {text[:120]}"
                return
            async for line in lines:
                if line.startswith("data: ") and line[6:] != "[DONE]":
                    self._take(json.loads(line[6:]), shot, time.perf_counter() - start)
        finally:
            close()

    def _take(self, data: dict[str, Any], shot: Shot, now: float) -> None:
        if "error" in data:
            shot.error = str(data["error"].get("message"))[:120]
        for choice in data.get("choices") or ():
            delta = choice.get("delta") or {}
            piece = delta.get("content") or "".join(
                t["function"].get("arguments") or "" for t in delta.get("tool_calls") or ()
            )
            if piece:
                shot.pieces.append(now)
                shot.text += piece
        if data.get("usage"):
            shot.tokens, shot.prompt = data["usage"]["completion_tokens"], data["usage"]["prompt_tokens"]
        if (data.get("stretto") or {}).get("forwards") is not None:
            shot.cost = data["stretto"]

    async def _open(self, verb: str, path: str, body: bytes | None) -> tuple[int, Any, Callable[[], None]]:
        """(status, lines of the body, close)"""
        tls = ssl.create_default_context() if self._tls else None
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port, ssl=tls, limit=1 << 24)
        except OSError as error:
            raise ConnectionError(f"nobody answers at {self.url}: {error}") from None
        head = [f"{verb} {self._root}{path} HTTP/1.1", f"Host: {self._host}:{self._port}", "Connection: close"]
        if self._key:
            head.append(f"Authorization: Bearer {self._key}")
        if body is not None:
            head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        writer.write("\r\n".join([*head, "", ""]).encode() + (body or b""))
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        chunked = False
        while (line := (await reader.readline()).strip()):
            chunked |= line.lower().startswith(b"transfer-encoding:") and b"chunked" in line.lower()
        return status, _lines(_chunks(reader) if chunked else _rest(reader)), writer.close


async def _rest(reader: asyncio.StreamReader) -> Any:
    while data := await reader.read(1 << 16):
        yield data


async def _chunks(reader: asyncio.StreamReader) -> Any:
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _lines(parts: Any) -> Any:
    rest = b""
    async for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace").strip("\r")
    if rest:
        yield rest.decode("utf-8", "replace")
