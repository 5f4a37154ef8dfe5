"""The front's end of the engine process: starts it, posts to it, hands its events to the requests they belong to.

A request has a ``Channel``. The engine never waits for a reader: events that nobody has taken yet are merged, and a
channel that holds more than its cap is given up.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stretto.errors import CapacityError, EngineError, InputError, StrettoError, UnsupportedError
from stretto.serving.protocol import UnknownSessionError, encode, merge_event, read

__all__ = ["Channel", "DeadlineError", "Link"]


class DeadlineError(EngineError):
    """The deadline of a request passed."""


ERRORS: dict[str, Callable[[str], StrettoError]] = {
    "InputError": InputError, "CapacityError": CapacityError, "Deadline": DeadlineError,
    "UnsupportedError": UnsupportedError, "UnknownSessionError": UnknownSessionError,
}


def raised(error: dict[str, Any]) -> StrettoError:
    """The exception that an error message stands for; ``param`` names the option it is about."""
    made = ERRORS.get(error["type"], EngineError)(error["message"])
    made.param = error.get("param")  # type: ignore[attr-defined]
    return made


@dataclass(slots=True, eq=False)
class Channel:
    """Events of one request on their way to its reader. ``cap``: bytes of text that may wait."""

    id: str
    choices: int
    cap: int
    arrival: float = field(default_factory=time.monotonic)
    first: float | None = None  # when its first token came
    prompt: int = 0  # tokens of its prompt
    _held: dict[int, dict[str, Any]] = field(default_factory=dict)
    _bytes: int = 0
    _error: StrettoError | None = None
    _open: int = 0
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _added: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._open = self.choices

    @property
    def held(self) -> bool:
        return bool(self._held)

    @property
    def done(self) -> bool:
        return self._error is not None or not self._open

    def push(self, event: dict[str, Any]) -> None:
        """Merge an event into what waits for its choice."""
        self.first = self.first or time.monotonic()
        held = self._held.get(event["choice"])
        if held is None:
            self._held[event["choice"]] = event
        else:
            merge_event(held, event)
        self._bytes += len(event["text"]) + 16 * len(event["tokens"])
        self._open -= "finish" in event
        self._wake.set()

    def added(self) -> None:
        self._added.set()

    def fail(self, error: StrettoError) -> None:
        self._error = self._error or error
        self._added.set()
        self._wake.set()

    async def accepted(self) -> None:
        """Wait until the engine has queued the request; raises why it has not."""
        await self._added.wait()
        if self._error is not None and self.first is None:
            raise self._error

    @property
    def overflown(self) -> bool:
        return self._bytes > self.cap

    async def take(self, timeout: float | None = None) -> list[dict[str, Any]]:
        """Everything that waits, at most one event a choice; [] at the end, and after ``timeout`` seconds without any.

        Raises the error of the request, after what was final before it.
        """
        if not self._held and not self.done:
            self._wake.clear()
            try:
                async with asyncio.timeout(timeout):  # wait_for of Python 3.11 can swallow a cancellation
                    await self._wake.wait()
            except TimeoutError:
                return []
        events = [self._held[c] for c in sorted(self._held)]
        self._held, self._bytes = {}, 0
        if not events and self._error is not None:
            raise self._error
        return events


class Link:
    """``options``: those of LLM; ``restarts``: how often a dead engine is started again within ``window`` seconds;
    ``lost`` is set when it stays dead; ``watch`` sees every message of the engine; ``more``: of the "open" message."""

    def __init__(
        self, model: str, options: dict[str, Any], *, plain: str = "ar", restarts: int = 0, window: float = 600.0,
        channel_bytes: int = 1 << 20, watch: Callable[[dict[str, Any]], None] | None = None,
        more: dict[str, Any] | None = None,
    ):
        self._open_message = {"op": "open", "model": model, "options": options, "plain": plain, **(more or {})}
        self._restarts, self._window, self._cap = restarts, window, channel_bytes
        self._watch = watch or (lambda message: None)
        self._channels: dict[str, Channel] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._ids, self._deaths = itertools.count(), [0.0] * 0
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._closing = False
        self.facts: dict[str, Any] = {}
        self.state = "starting"
        self.reason = "the engine is loading"
        self.lost = asyncio.Event()
        self.starts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def waiting(self) -> int:
        """Choices whose request has no token yet."""
        return sum(c.choices for c in self._channels.values() if c.first is None)

    @property
    def waiting_tokens(self) -> int:
        return sum(c.prompt for c in self._channels.values() if c.first is None)

    @property
    def live(self) -> int:
        """Choices of all requests that are not finished."""
        return sum(c.choices for c in self._channels.values())

    async def start(self) -> None:
        """Start the engine process and wait until it has loaded. EngineError when it cannot."""
        self.state, self.reason = "starting", "the engine is loading"
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stretto.serving.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), start_new_session=True, stdin=subprocess.DEVNULL,
            )
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
        self._post(self._open_message)
        first = await read(reader)
        if first is None or first["op"] != "ready":
            await asyncio.to_thread(self._process.wait)
            self.state = "dead"
            reason = first["error"]["message"] if first else f"it ended with code {self._process.returncode}"
            self.reason = f"the engine did not start: {reason}"
            raise EngineError(self.reason)
        self.facts, self.state, self.reason = first, "ready", ""
        self.starts += 1
        self._reading = asyncio.create_task(self._read(reader))

    async def close(self) -> None:
        """End the engine process; running requests get an error."""
        self._closing = True
        if self._process is None:
            return
        if self.state == "ready":
            self._post({"op": "close"})
        try:
            await asyncio.wait_for(asyncio.to_thread(self._process.wait, 5), 6)
        except (TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
        if self._reading is not None:
            await asyncio.wait([self._reading], timeout=2)
        if self._writer is not None:
            self._writer.close()

    def submit(self, request: dict[str, Any], choices: int) -> Channel:
        """Queue a request; its channel. EngineError when there is no engine now."""
        if self.state != "ready":
            raise EngineError(self.reason)
        channel = Channel(request["id"], choices, self._cap)
        self._channels[channel.id] = channel
        self._post({"op": "add", **request})
        return channel

    def abort(self, channel: Channel) -> None:
        """Forget a request; idempotent, and also right for one that is finished."""
        if self._channels.pop(channel.id, None) is not None and not channel.done and self.state == "ready":
            self._post({"op": "abort", "id": channel.id})

    async def call(self, name: str, timeout: float, **args: Any) -> Any:
        """Ask the engine's thread. EngineError when it is dead or does not answer in time."""
        if self.state != "ready":
            raise EngineError(self.reason)
        number = next(self._ids)
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        self._post({"op": "call", "call": number, "name": name, "args": args})
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise EngineError(f"the engine has not answered for {timeout:g} s") from None
        finally:
            self._calls.pop(number, None)

    def _post(self, message: dict[str, Any]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while (message := await read(reader)) is not None:
            self._watch(message)
            op = message["op"]
            if op == "step":
                for event in message["events"]:
                    self._deliver(event)
            elif op == "added":
                if message["id"] in self._channels:
                    self._channels[message["id"]].added()
            elif op == "error":
                channel = self._channels.pop(message["id"], None)
                if channel is not None:
                    channel.fail(raised(message["error"]))
            elif op == "result":
                future = self._calls.get(message["call"])
                if future is not None and not future.done():
                    if "error" in message:
                        future.set_exception(raised(message["error"]))
                    else:
                        future.set_result(message["value"])
            await asyncio.sleep(0)  # reading buffered frames never yields: without this a fast engine starves the front
        await self._died()

    def _deliver(self, event: dict[str, Any]) -> None:
        channel = self._channels.get(event["id"])
        if channel is None:
            return
        channel.push(event)
        if channel.overflown:
            self.abort(channel)
            text = f"more than {channel.cap} bytes of this answer wait to be read: it was given up"
            channel.fail(CapacityError(text))
        elif channel.done:
            self._channels.pop(channel.id, None)

    async def _died(self) -> None:
        """Everybody who waits gets an error; then a new engine, or none."""
        process, self.state = self._process, "dead"
        if process is not None:
            try:
                await asyncio.wait_for(asyncio.to_thread(process.wait, 2), 3)
            except (TimeoutError, subprocess.TimeoutExpired):
                os.kill(process.pid, signal.SIGKILL)  # its socket is closed: it hangs
                process.wait()
            self.reason = f"the engine process ended with code {process.returncode}"
        error = EngineError(f"{self.reason} while this request ran: send it again")
        for channel in list(self._channels.values()):
            channel.fail(error)
        self._channels.clear()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineError(self.reason))
        if not self._closing:
            self._reviving = asyncio.create_task(self._revive())

    async def _revive(self) -> None:
        now = time.monotonic()
        self._deaths = [t for t in self._deaths if t > now - self._window] + [now]
        if len(self._deaths) > self._restarts:
            self.lost.set()
            return
        died = self.reason
        print(f"stretto: {died}; starting it again", file=sys.stderr, flush=True)
        await asyncio.sleep(min(8.0, 0.25 * 2 ** len(self._deaths)))
        try:
            await self.start()
        except EngineError:
            await self._revive()
