"""Sessions over HTTP: threads of one prompt that fork, generate together and come back, by one route a verb.

Every answer carries the state of the session: its threads and its account. A session ends by DELETE, or when nobody
has asked for it for a while.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from stretto.errors import InputError, PromptError
from stretto.serving.answers import Answer, collect
from stretto.serving.edge import EventStream, while_there
from stretto.serving.link import Channel
from stretto.serving.problems import Json
from stretto.serving.requests import gen_message, plain_message, salt_of, token_ids
from stretto.serving.schemas import (
    AppendBody,
    ForkBody,
    GenBody,
    JoinBody,
    SessionBody,
    ThreadBody,
    TruncateBody,
)
from stretto.serving.service import Service

__all__ = ["add_sessions"]


def add_sessions(
    app: FastAPI, service: Service, declared: dict[int | str, dict[str, Any]], events: dict[int | str, Any]
) -> None:
    """The routes under /v1/sessions. ``events``: what is declared of an answer that may come as events."""
    _whole(app, service, declared)
    _threads(app, service, declared)

    @app.post("/v1/sessions/{session}/gen", responses=declared | events)
    async def gen(session: str, body: GenBody, request: Request) -> Response:
        """Threads generate together; whole, or as server-sent events that name their thread."""
        service.check_model(body.model)
        message = await asyncio.to_thread(gen_message, body, service.model)
        owner = _owner(request)
        message |= {"id": f"gen-{secrets.token_hex(12)}", "session": session, "owner": owner}
        channel = service.gen(message)
        try:
            await channel.accepted()
            if body.stream:
                return EventStream(_events(service, session, owner, body, channel), lambda: service.link.abort(channel))
            answers = await while_there(request, collect(channel))
        except BaseException:
            service.link.abort(channel)
            raise
        said = [_said(t, a) for t, a in zip(body.threads, answers, strict=True)]
        return Json({**await service.session("state", session, owner), "generated": said})


def _whole(app: FastAPI, service: Service, declared: dict[int | str, dict[str, Any]]) -> None:
    @app.post("/v1/sessions", responses=declared)
    async def start(body: SessionBody, request: Request) -> Response:
        """Open a session on a prompt."""
        service.check_model(body.model)
        prompt = await asyncio.to_thread(_prompt, service, body)
        return Json(await service.session(
            "open", f"sess-{secrets.token_hex(12)}", _owner(request), prompt=prompt, max_threads=body.max_threads,
            max_evaluated=body.max_evaluated, max_path=body.max_path, priority=body.priority,
            salt=salt_of(request.state.tenant, body.cache_salt),
        ))

    @app.get("/v1/sessions/{session}", responses=declared)
    async def state(session: str, request: Request) -> Response:
        """Threads, texts and account."""
        return Json(await service.session("state", session, _owner(request)))

    @app.delete("/v1/sessions/{session}", responses=declared)
    async def close(session: str, request: Request) -> Response:
        """Give everything back; what still generates is given up."""
        return Json({**await service.session("close", session, _owner(request)), "deleted": True})


def _threads(app: FastAPI, service: Service, declared: dict[int | str, dict[str, Any]]) -> None:
    async def do(verb: str, session: str, request: Request, **args: Any) -> Response:
        return Json(await service.session(verb, session, _owner(request), **args))

    def ids(name: str, given: str | list[int]) -> list[int]:
        return token_ids(name, given, service.model)

    @app.post("/v1/sessions/{session}/fork", responses=declared)
    async def fork(session: str, body: ForkBody, request: Request) -> Response:
        prefixes = None if body.prefixes is None else [ids("prefixes", p) for p in body.prefixes]
        return await do("fork", session, request, thread=body.thread, n=body.n, prefixes=prefixes,
                        positions=body.positions)

    @app.post("/v1/sessions/{session}/join", responses=declared)
    async def join(session: str, body: JoinBody, request: Request) -> Response:
        """Children come back: share, reencode, rotate, gather or select."""
        separator = None if body.separator is None else ids("separator", body.separator)
        return await do("join", session, request, thread=body.thread, children=body.children, mode=body.mode,
                        order=body.order, separator=separator, select=body.select)

    @app.post("/v1/sessions/{session}/append", responses=declared)
    async def append(session: str, body: AppendBody, request: Request) -> Response:
        """Put forced text behind a thread."""
        return await do("append", session, request, thread=body.thread, text=ids("text", body.text))

    @app.post("/v1/sessions/{session}/truncate", responses=declared)
    async def truncate(session: str, body: TruncateBody, request: Request) -> Response:
        """Forget the tokens of a thread from ``length`` on."""
        return await do("truncate", session, request, thread=body.thread, length=body.length)

    @app.post("/v1/sessions/{session}/score", responses=declared)
    async def score(session: str, body: AppendBody, request: Request) -> Response:
        """Log-probabilities of a text behind a thread, which stays as it is."""
        return await do("score", session, request, thread=body.thread, text=ids("text", body.text))

    @app.post("/v1/sessions/{session}/end", responses=declared)
    async def end(session: str, body: ThreadBody, request: Request) -> Response:
        """Give a thread and its children back."""
        return await do("end", session, request, thread=body.thread)


def _owner(request: Request) -> str:
    return salt_of(request.state.tenant, None)


def _prompt(service: Service, body: SessionBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InputError("give prompt or messages, one of them")
    if body.prompt is not None:
        found = token_ids("prompt", body.prompt, service.model)
    else:
        found = service.tokenizer.chat_ids([plain_message(m, service.tokenizer) for m in body.messages or []])
    if not found:
        raise PromptError("the prompt is empty: give at least one token")
    return found


async def _events(
    service: Service, session: str, owner: str, body: GenBody, channel: Channel
) -> AsyncIterator[dict[str, Any] | None]:
    """News of the threads as they come; the state of the session at the end."""
    while not (done := channel.done) or channel.held:
        events = await channel.take(service.settings.ping)
        if not events and not done:
            if not channel.done:
                yield None
            continue
        for event in events:
            yield _news(service, session, body, event)
    await channel.take()
    yield {**await service.session("state", session, owner), "object": "session.end"}


def _news(service: Service, session: str, body: GenBody, event: dict[str, Any]) -> dict[str, Any]:
    news = {
        "id": session, "object": "session.chunk", "thread": body.threads[event["choice"]], "text": event["text"],
        "token_ids": event["tokens"], "finish_reason": event.get("finish"),
    }
    if body.include_steps:
        texts = [service.tokenizer.token_bytes(t).decode("utf-8", "replace") for t in event["tokens"]]
        news["stretto"] = {"tokens": [list(x) for x in zip(texts, event["forwards"], strict=True)]}
    return news


def _said(thread: int, answer: Answer) -> dict[str, Any]:
    return {
        "thread": thread, "text": answer.text, "token_ids": answer.tokens, "finish_reason": answer.finish,
        "cost": answer.cost,
    }
