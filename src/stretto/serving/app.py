"""The routes. Bodies are checked by pydantic, errors have OpenAI's shape, and a client that leaves is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from stretto import __version__
from stretto.serving.answers import Answer, ChatShape, CompletionShape, Shape, collect, cost, usage
from stretto.serving.edge import Edge, EventStream, while_there
from stretto.serving.link import Channel
from stretto.serving.problems import Json, Problem, problem_of
from stretto.serving.requests import Job, chat_job, completion_jobs
from stretto.serving.schemas import ChatBody, CompletionBody, DetokenizeBody, SamplingBody, TokenizeBody
from stretto.serving.service import Service
from stretto.serving.session_routes import add_sessions
from stretto.serving.tools import Reader

__all__ = ["create_app"]

DECLARED: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot be served as it is."}, 401: {"description": "No valid key."},
    404: {"description": "No such model."}, 408: {"description": "The deadline passed."},
    413: {"description": "The body is too large."}, 429: {"description": "Too much waits already; see Retry-After."},
    503: {"description": "No engine now, or the server is shutting down."},
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, whole or as events.", "content": {"text/event-stream": {}}},
}
POLICY = "default-src 'self'; img-src 'self' data:"
PAGE = {"": "text/html", "page.js": "text/javascript", "threads.js": "text/javascript", "page.css": "text/css"}


def create_app(service: Service) -> FastAPI:
    """The application around a service, which it starts and ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if service.link.starts == 0:
            await service.start()
        yield
        await service.close()

    app = FastAPI(title="stretto", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Edge, service=service)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _any)
    for kind in (Problem, *_ours()):
        app.add_exception_handler(kind, _any)
    _completions(app, service)
    add_sessions(app, service, DECLARED, EVENTS)
    _about(app, service)
    _text(app, service)
    _page(app)
    app.openapi = lambda: _described(app, service)  # type: ignore[method-assign]
    return app


def _described(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI page; ``model`` can only be what is served."""
    page = FastAPI.openapi(app)
    for name, schema in page["components"]["schemas"].items():
        if name in ("ChatBody", "CompletionBody", "GenBody", "SessionBody"):
            schema["properties"]["model"]["enum"] = [service.name]
    return page


def _ours() -> tuple[type[Exception], ...]:
    from stretto.errors import StrettoError

    return (StrettoError,)


def _completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", responses=DECLARED | EVENTS)
    async def chat(body: ChatBody, request: Request) -> Response:
        """A chat completion, whole or as server-sent events."""
        _known(service, body)
        job = await asyncio.to_thread(chat_job, body, service.model, request.state.tenant)
        shape = ChatShape(f"chatcmpl-{secrets.token_hex(12)}", body.model, service.tokenizer, service.stop_ids)
        return await _answer(service, request, body, [job], shape)

    @app.post("/v1/completions", responses=DECLARED | EVENTS)
    async def complete(body: CompletionBody, request: Request) -> Response:
        """A text completion of one or more prompts, whole or as server-sent events."""
        _known(service, body)
        jobs = await asyncio.to_thread(completion_jobs, body, service.model, request.state.tenant)
        shape = CompletionShape(f"cmpl-{secrets.token_hex(12)}", body.model, service.tokenizer, service.stop_ids)
        return await _answer(service, request, body, jobs, shape)


def _known(service: Service, body: SamplingBody) -> None:
    service.check_model(body.model)
    unknown = sorted(body.model_extra or {})
    if unknown and service.settings.strict:
        raise Problem(400, f"unknown field {unknown[0]!r}", param=unknown[0], code="unknown_field")


async def _answer(
    service: Service, request: Request, body: SamplingBody, jobs: Sequence[Job], shape: Shape
) -> Response:
    channels: list[Channel] = []
    try:
        for i, job in enumerate(jobs):
            channels.append(service.submit(job, f"{shape.id}-{i}"))
        for channel in channels:
            await channel.accepted()
        for job in jobs:
            if job.echo and job.top is not None:
                found = await service.link.call("score", service.settings.score_timeout, prompt=job.prompt, top=job.top)
                job.scores = [dict(map(tuple, pairs)) for pairs in found]
        if body.stream:
            events = _chunks(service, body, jobs, channels, shape)
            return EventStream(events, lambda: _abort(service, channels), headers=_headers(body))
        answers = await while_there(request, _collect(channels))
    except BaseException:
        _abort(service, channels)
        raise
    choices = [
        shape.choice(job, answer, i * len(group) + answer.index)
        for i, (job, group) in enumerate(zip(jobs, answers, strict=True)) for answer in group
    ]
    return Json(
        {**shape.head(shape.whole), "choices": choices, "usage": usage(jobs, answers),
         "system_fingerprint": f"stretto-{__version__}", "stretto": cost(jobs, answers)},
        headers=_headers(body),
    )


def _headers(body: SamplingBody) -> dict[str, str]:
    ignored = ",".join(k for k in sorted(body.model_extra or {}) if k.isascii() and k.isidentifier())[:200]
    return {"X-Stretto-Ignored": ignored} if ignored else {}


def _abort(service: Service, channels: Sequence[Channel]) -> None:
    for channel in channels:
        service.link.abort(channel)


async def _collect(channels: Sequence[Channel]) -> list[list[Answer]]:
    return [await collect(channel) for channel in channels]


async def _chunks(
    service: Service, body: SamplingBody, jobs: Sequence[Job], channels: Sequence[Channel], shape: Shape
) -> AsyncIterator[dict[str, Any] | None]:
    """The objects of a stream, in the order in which they became final; None = nothing for a while."""
    counted = body.stream_options is not None and body.stream_options.include_usage
    head = shape.head(shape.partial) | ({"usage": None} if counted else {})
    answers = [[Answer(i) for i in range(c.choices)] for c in channels]
    readers = {(k, i): Reader(job.tools) for k, job in enumerate(jobs) if job.tools for i in range(job.params["n"])}
    for k, job in enumerate(jobs):
        for i in range(job.params["n"]):
            opening = shape.opening(k * job.params["n"] + i)
            if opening is not None:
                yield {**head, "choices": [opening]}
            if job.echo:
                yield {**head, "choices": [{"index": i, "text": job.text, "logprobs": None, "finish_reason": None}]}
    async for k, event in _merged(channels, service.settings.ping):
        if event is None:
            yield None
            continue
        answers[k][event["choice"]].add(event)
        index = k * jobs[k].params["n"] + event["choice"]
        deltas = shape.deltas(jobs[k], event, readers.get((k, event["choice"])), index)
        if body.include_steps and not deltas and event["tokens"]:
            deltas = [{"index": index, "delta": {}, "logprobs": None, "finish_reason": None}]
        for j, delta in enumerate(deltas):
            more = {"stretto": _steps(shape, event)} if body.include_steps and not j else {}
            if delta.get("finish_reason") and "cost" in event:
                more["stretto"] = more.get("stretto", {}) | cost([jobs[k]], [[answers[k][event["choice"]]]])
            yield {**head, "choices": [delta], **more}
    if counted:
        yield {**head, "choices": [], "usage": usage(jobs, answers), "stretto": cost(jobs, answers)}


def _steps(shape: Shape, event: dict[str, Any]) -> dict[str, Any]:
    shown = shape.shown(event)
    return {"tokens": [[shape.text_of(t), f] for (t, _), f in zip(shown, event["forwards"], strict=False)]}


async def _merged(channels: Sequence[Channel], ping: float) -> AsyncIterator[tuple[int, dict[str, Any] | None]]:
    """(channel, event) of several channels as they come."""
    if len(channels) == 1:
        while not (done := channels[0].done) or channels[0].held:
            events = await channels[0].take(ping)
            if not events and not done:
                if channels[0].done:
                    continue
                yield 0, None
            for event in events:
                yield 0, event
        await channels[0].take()
        return
    waiting = {asyncio.ensure_future(c.take()): k for k, c in enumerate(channels)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, timeout=ping, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield 0, None
            for future in done:
                k = waiting.pop(future)
                events = future.result()
                if events:
                    waiting[asyncio.ensure_future(channels[k].take())] = k
                for event in events:
                    yield k, event
    finally:
        for future in waiting:
            future.cancel()


def _about(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses={401: DECLARED[401]})
    async def models() -> Response:
        return Json({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}", responses={k: DECLARED[k] for k in (401, 404)})
    async def model(name: str) -> Response:
        service.check_model(name)
        return Json(_model(service))

    @app.get("/v1/methods", responses={401: DECLARED[401]})
    async def methods() -> Response:
        """Decoding methods that serve this model, for ``method`` in a request's body."""
        return Json({"methods": service.methods(), "auto": service.settings.auto[0]})

    @app.get("/v1/drafters", responses={k: DECLARED[k] for k in (401, 404, 503)})
    async def drafters() -> Response:
        """Versions of the drafter that learns while it serves, and how each does."""
        return Json(await service.drafters("drafters"))

    @app.post("/v1/drafters/{what}", responses={k: DECLARED[k] for k in (400, 401, 404, 503)})
    async def change_drafter(what: Literal["update", "rollback"]) -> Response:
        """Look for a new version now, or go back to the one before."""
        return Json(await service.drafters(what))

    @app.get("/health", responses={503: DECLARED[503]})
    async def health() -> Response:
        """A round trip through the engine's loop."""
        return Json({"status": "ok", "pid": service.link.pid, "starts": service.link.starts, **await service.health()})

    @app.get("/ready", responses={503: DECLARED[503]})
    async def ready() -> Response:
        """Whether new requests are welcome."""
        if service.draining:
            raise Problem(503, "the server is shutting down", code="draining")
        await service.health()
        return Json({"status": "ready"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus text."""
        with contextlib.suppress(Exception):
            await service.health()
        service.metrics.starts.set(service.link.starts)
        content, kind = service.metrics.page()
        return Response(content, media_type=kind)

    @app.get("/version")
    async def version() -> Response:
        return Json({"version": __version__})


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name, "object": "model", "created": service.created, "owned_by": "stretto",
        "max_model_len": service.model.max_model_len, "root": service.settings.model,
    }


def _text(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", responses={k: DECLARED[k] for k in (400, 401, 404, 413)})
    async def tokenize(body: TokenizeBody) -> Response:
        """Ids of a prompt, or of messages in the chat template."""
        if body.model is not None:
            service.check_model(body.model)
        return Json(await asyncio.to_thread(_tokenize, service, body))

    @app.post("/detokenize", responses={k: DECLARED[k] for k in (400, 401, 404, 413)})
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of ids."""
        if body.model is not None:
            service.check_model(body.model)
        bad = next((t for t in body.tokens if not 0 <= t < service.model.vocabulary), None)
        if bad is not None:
            raise Problem(400, f"token id {bad} is not in the vocabulary", param="tokens")
        return Json({"prompt": service.tokenizer.decode(body.tokens, skip_special_tokens=False)})


def _tokenize(service: Service, body: TokenizeBody) -> dict[str, Any]:
    from stretto.serving.requests import clean, plain_message

    if (body.prompt is None) == (body.messages is None):
        raise Problem(400, "give prompt or messages, one of them", param="prompt")
    if body.prompt is not None:
        text = clean("prompt", body.prompt)
        ids = service.tokenizer.encode(text, add_special_tokens=body.add_special_tokens)
    else:
        ids = service.tokenizer.chat_ids([plain_message(m, service.tokenizer) for m in body.messages or []])
    return {"count": len(ids), "max_model_len": service.model.max_model_len, "tokens": ids}


def _page(app: FastAPI) -> None:
    folder = resources.files("stretto.serving") / "page"

    def serve(name: str, kind: str) -> Any:
        content = (folder / (name or "index.html")).read_bytes()

        async def file() -> Response:
            return Response(content, media_type=kind, headers={"Content-Security-Policy": POLICY})

        return file

    for name, kind in PAGE.items():
        app.add_api_route(f"/{name}", serve(name, kind), include_in_schema=False)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(x) for x in first["loc"] if x != "body")
    said = f"{where}: {first['msg']}" if where else str(first["msg"])
    return Problem(400, said[:500], param=where or None).response()


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Problem(error.status_code, str(error.detail), code=None).response()


async def _any(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    service: Service = request.app.state.service
    if service._metrics is not None:
        service.metrics.refuse(problem.status)
    return problem.response()


