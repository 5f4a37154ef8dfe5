"""Where HTTP meets the routes: keys, body limits, event streams, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stretto.serving.problems import Problem, problem_of
from stretto.serving.service import Service

__all__ = ["Edge", "EventStream", "while_there"]

T = TypeVar("T")

OPEN = frozenset({
    "/", "/page.js", "/threads.js", "/page.css", "/health", "/ready", "/metrics", "/version", "/openapi.json",
})


class Edge:
    """ASGI middleware: refuses requests without a key (401) and bodies over the limit (413), before the routes."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        state = scope.setdefault("state", {})
        try:
            state["tenant"] = ""
            if scope["path"] not in OPEN:
                state["tenant"] = self._service.tenant(headers.get(b"authorization", b"").decode("latin-1"))
            body = await self._body(headers, receive) if scope["method"] in ("POST", "PUT", "PATCH") else b""
        except Problem as problem:
            await problem.response()(scope, receive, send)
            return
        if body is None:
            return
        await self._app(scope, _replay(body, receive), send)

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None when the client left. Problem 413."""
        limit = self._service.settings.max_body
        large = Problem(413, f"the body has more than {limit} bytes", code="body_too_large")
        stated = headers.get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > limit:
            raise large
        parts, total = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            total += len(parts[-1])
            if total > limit:
                raise large
            if not message.get("more_body"):
                return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def gone(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def while_there(request: Request, work: Awaitable[T]) -> T:
    """What ``work`` gives; Problem, and ``work`` is cancelled, when the client leaves before."""
    task, leave = asyncio.ensure_future(work), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait([task, leave], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem(400, "the client left", code="disconnected")
        return task.result()
    finally:
        leave.cancel()
        task.cancel()


class EventStream(Response):
    """Server-sent events: every object as ``data: {...}``, None as a comment, then ``data: [DONE]``.

    ``closed`` is called at the end, whatever it was: finished, failed, or the client left. The status is already sent
    when something fails: the error is then an event of its own.
    """

    def __init__(self, events: AsyncIterator[dict[str, Any] | None], closed: Callable[[], None],
                 headers: Mapping[str, str] | None = None):
        own = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=own | dict(headers or {}))
        del self.headers["content-length"]
        self._events, self._closed = events, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        write = asyncio.ensure_future(self._write(send))
        leave = asyncio.ensure_future(gone(Request(scope, receive)))
        try:
            await asyncio.wait([write, leave], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._closed()
            for task in (write, leave):
                task.cancel()
            await asyncio.gather(write, leave, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def put(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async for value in self._events:
                await put(b": ping\n\n" if value is None else _event(value))
        except Exception as error:
            await put(_event(problem_of(error).body()))
        await put(b"data: [DONE]\n\n", more=False)


def _event(value: dict[str, Any]) -> bytes:
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + body.encode("utf-8", "replace") + b"\n\n"
