"""What the front and the engine process say to each other: frames of a length (4 bytes, big-endian) and a JSON object.

front to engine   {"op": "open", ...}      first: how to load the model (fields of worker.open_llm)
                  {"op": "add", "id", "prompt", "params", "method", "options", "salt", "priority", "deadline"}
                  {"op": "gen", "id", "session", "owner", "threads", "params", "method", "options", "deadline"}
                  {"op": "abort", "id"}    idempotent
                  {"op": "call", "call", "name", "args"}   something of Loop.CALLS, answered in the engine's thread
                  {"op": "close"}
engine to front   {"op": "ready", ...}     facts of the model, once
                  {"op": "failed", "error"}   it could not be loaded
                  {"op": "added", "id"}    a request is queued
                  {"op": "step", "events": [...], "stats": {...}}   after every forward that made something final
                  {"op": "error", "id", "error"}   a request that was refused or given up
                  {"op": "result", "call", "value" | "error"}

An event: {"id", "choice", "text", "tokens", "forwards", "logprobs"?, "finish"?, "stop"?, "cost"?}; ``text`` can not
change any more. An error: {"type", "message", "param"?}, type being a class of stretto.errors or "Deadline".
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

from stretto.errors import InputError

__all__ = ["UnknownSessionError", "LIMIT", "encode", "merge", "merge_event", "read", "receive"]

LIMIT = 1 << 28  # bytes of a frame; more is a bug, not a message


class UnknownSessionError(InputError):
    """No such session, or another client's."""


def encode(message: dict[str, Any]) -> bytes:
    """One frame."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > LIMIT:
        raise ValueError(f"a message of {len(body)} bytes: at most {LIMIT}")
    return len(body).to_bytes(4, "big") + body


def merge_event(held: dict[str, Any], event: dict[str, Any]) -> None:
    """Append what ``event`` says to ``held``, an earlier event of the same choice."""
    for key in ("text", "tokens", "forwards", "logprobs"):
        if key in event:
            held[key] = held[key] + event[key]
    held.update({k: event[k] for k in ("finish", "stop", "cost") if k in event})


def merge(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same news in fewer messages: the steps become one, behind what was queued or answered, before the errors."""
    steps = [m for m in messages if m["op"] == "step"]
    if len(steps) < 2:
        return messages
    events: dict[tuple[str, int], dict[str, Any]] = {}
    for event in [e for m in steps for e in m["events"]]:
        held = events.get((event["id"], event["choice"]))
        if held is None:
            events[event["id"], event["choice"]] = dict(event)
        else:
            merge_event(held, event)
    step = {"op": "step", "events": list(events.values()), "stats": steps[-1]["stats"]}
    last = [m for m in messages if m["op"] in ("error", "failed")]
    return [*(m for m in messages if m["op"] not in ("step", "error", "failed")), step, *last]


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """The next message of a blocking socket; None when the other side is gone."""
    head = _exactly(sock, 4)
    body = _exactly(sock, int.from_bytes(head, "big")) if head else None
    return json.loads(body) if body else None


async def read(stream: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message of a stream; None when the other side is gone."""
    try:
        head = await stream.readexactly(4)
        return json.loads(await stream.readexactly(int.from_bytes(head, "big")))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _exactly(sock: socket.socket, n: int) -> bytes | None:
    parts = []
    while n:
        try:
            part = sock.recv(min(n, 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts.append(part)
        n -= len(part)
    return b"".join(parts)
