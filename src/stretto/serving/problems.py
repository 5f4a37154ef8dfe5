"""Errors as OpenAI's clients expect them: a status and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from stretto.errors import CapacityError, EngineError, InputError, UnknownNameError
from stretto.serving.link import DeadlineError
from stretto.serving.protocol import UnknownSessionError

__all__ = ["Json", "Problem", "problem_of", "shape"]

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error",
    500: "server_error", 503: "overloaded_error",
}


class Json(Response):
    """JSON that never fails on what a client sent: halves of characters become question marks."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class Problem(Exception):
    """An answer that is an error. ``retry``: seconds for Retry-After."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 retry: float | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def body(self) -> dict[str, Any]:
        return shape(self.message, KINDS.get(self.status, "server_error"), self.param, self.code)

    def response(self) -> Json:
        headers = {} if self.retry is None else {"Retry-After": str(max(1, round(self.retry)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Json(self.body(), self.status, headers)


def shape(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def problem_of(error: Exception) -> Problem:
    """The problem that an exception is to a client. What nobody expected is a 500 that tells nothing of the inside."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, UnknownNameError):
        return Problem(400, str(error), param=error.kind.split()[0], code="unknown_name")
    if isinstance(error, UnknownSessionError):
        return Problem(404, str(error), code="session_not_found")
    if isinstance(error, InputError):
        param = getattr(error, "param", None) or getattr(error, "name", None)
        return Problem(400, str(error), param=PARAMS.get(param, param), code=getattr(error, "code", None))
    if isinstance(error, CapacityError):
        return Problem(400, str(error), code="capacity_exceeded")
    if isinstance(error, DeadlineError):
        return Problem(408, str(error), param="timeout", code="deadline_exceeded")
    if isinstance(error, EngineError):
        return Problem(503, str(error), code="engine_unavailable", retry=2)
    return Problem(500, "an error inside the server; its log says more", code="internal_error")


PARAMS = {"json_schema": "response_format"}  # where OpenAI's name of a field is another one
