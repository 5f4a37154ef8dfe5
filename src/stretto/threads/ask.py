"""One JSON request to an OpenAI-style endpoint, and what an error of it means."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from stretto.errors import EngineError, InputError

__all__ = ["ask"]

AGAIN = (408, 409, 429)  # statuses below 500 after which a second try may help


def ask(url: str, body: dict[str, Any] | None, *, key: str | None, timeout: float) -> Any:
    """The JSON that POST (GET without ``body``) answers. Raises EngineError where a second try may help, InputError
    where the request itself is at fault, OSError where nobody answers."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        words = error.read(2000).decode(errors="replace")
        kind = EngineError if error.code in AGAIN or error.code >= 500 else InputError
        raise kind(f"{url} answered {error.code}: {words}") from None
    except ValueError as error:
        raise EngineError(f"{url} answered something that is no JSON: {error}") from None
