"""Tool calls as this zoo's models write them: ``{"name": NAME, "arguments": {...}}``, alone or in a list.

``schema`` makes the grammar that forces a call; ``Reader`` finds calls in text that comes piece by piece.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Reader", "as_text", "schema"]

OPENING = '{"name": '
MIDDLE = ', "arguments": '
TAGS = ("<tool_call>", "</tool_call>")


def schema(tools: Sequence[Mapping[str, Any]], only: str | None = None, *, many: bool = False) -> dict[str, Any]:
    """JSON schema of one call (``many``: a list of calls) to one of ``tools`` (OpenAI's "function" objects)."""
    calls = []
    for tool in tools:
        if only is not None and tool["name"] != only:
            continue
        arguments = tool.get("parameters") or {"type": "object"}
        arguments = dict(arguments)
        shared = {k: arguments.pop(k) for k in ("$defs", "definitions") if k in arguments}
        calls.append(
            {
                "type": "object", "properties": {"name": {"const": tool["name"]}, "arguments": arguments},
                "required": ["name", "arguments"], "additionalProperties": False, **shared,
            }
        )
    one = calls[0] if len(calls) == 1 else _merged(calls)
    if not many:
        return one
    hoisted = {k: one.pop(k) for k in ("$defs", "definitions") if k in one}
    return {"type": "array", "items": one, "minItems": 1, "maxItems": 16, **hoisted}


def _merged(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Any of ``calls``; what they define stays reachable at the root."""
    shared: dict[str, Any] = {}
    for call in calls:
        for key in ("$defs", "definitions"):
            shared.setdefault(key, {}).update(call.pop(key, {}))
    return {"anyOf": calls, **{k: v for k, v in shared.items() if v}}


def as_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls of an earlier answer, as the model wrote them."""
    out = []
    for call in calls:
        function = call.get("function") or {}
        arguments = function.get("arguments") or "{}"
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        out.append({"name": function.get("name"), "arguments": arguments})
    return json.dumps(out[0] if len(out) == 1 else out, ensure_ascii=False)


@dataclass(slots=True)
class Reader:
    """Splits an answer into content and calls while it arrives.

    ``push`` returns the deltas that are certain: strings of content, or dicts {"index", "id"?, "name"?, "arguments"}.
    An answer that begins like a call but is none comes out as content at ``finish``.
    """

    names: frozenset[str]
    text: str = ""
    calls: int = 0
    _state: str = "start"  # start, content, between, arguments, maybe
    _at: int = 0  # how much of ``text`` is settled
    _depth: int = 0
    _string: bool = False
    _escaped: bool = False
    _out: list[Any] = field(default_factory=list)

    def push(self, piece: str) -> list[Any]:
        self.text += piece
        self._out = []
        while self._step():
            pass
        return self._out

    def finish(self) -> list[Any]:
        """What was held back, as content."""
        rest = self.text[self._at :]
        self._at = len(self.text)
        if self._state in ("content", "start") or (self._state == "between" and not self.calls):
            return [rest] if rest else []
        if self._state == "arguments":  # cut by max_tokens: what there is belongs to the call
            return [{"index": self.calls - 1, "arguments": rest}] if rest else []
        return []

    def _step(self) -> bool:
        if self._state == "content":
            if self._at < len(self.text):
                self._out.append(self.text[self._at :])
                self._at = len(self.text)
            return False
        if self._state == "arguments":
            return self._arguments()
        return self._opening()

    def _opening(self) -> bool:
        """Before a call: skip what may stand there, wait for what may become one."""
        rest = self.text[self._at :]
        lead, listed = 0, bool(self.calls)
        while lead < len(rest):
            tag = next((t for t in TAGS if rest.startswith(t, lead)), None)
            if tag:
                lead += len(tag)
            elif rest[lead] in " \n\r\t" or (self.calls and rest[lead] in ",]}"):
                lead += 1
            elif rest[lead] == "[" and not listed:
                listed, lead = True, lead + 1
            else:
                break
        body = rest[lead:]
        if not body or any(t.startswith(body) for t in TAGS):
            return False
        name = self._name(body)
        if name is None:
            return False
        if not name:
            if self.calls:
                self._at = len(self.text)  # noise behind a call
                return False
            self._state = "content"
            return True
        self._out.append({"index": self.calls, "id": f"call_{secrets.token_hex(12)}", "name": name, "arguments": ""})
        self.calls += 1
        self._at += lead + len(OPENING) + len(json.dumps(name, ensure_ascii=False)) + len(MIDDLE)
        self._state, self._depth = "arguments", 0
        self._string = self._escaped = False
        return True

    def _name(self, body: str) -> str | None:
        """The name of the call that ``body`` begins; "" when it is none, None when that is open."""
        for name in self.names:
            head = OPENING + json.dumps(name, ensure_ascii=False) + MIDDLE
            if body.startswith(head):
                return name
            if head.startswith(body):
                return None
        return ""

    def _arguments(self) -> bool:
        """Pass on the characters of one JSON value; stop behind it."""
        start = i = self._at
        ended = False
        while i < len(self.text) and not ended:
            c = self.text[i]
            if self._string:
                if self._escaped:
                    self._escaped = False
                elif c == "\\":
                    self._escaped = True
                elif c == '"':
                    self._string = False
            elif c == '"':
                self._string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                if self._depth == 0:  # the end of the call around a bare value
                    ended = True
                    break
                self._depth -= 1
                ended = self._depth == 0
            i += 1
        if i > start:
            self._out.append({"index": self.calls - 1, "arguments": self.text[start:i]})
        self._at = i
        if ended:
            self._state = "between"
        return ended
