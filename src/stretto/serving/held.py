"""Sessions that clients of the server hold: made, forked, joined and closed by messages, in the engine's thread.

A session belongs to the ``owner`` who opened it and is given back when it was idle for too long. Its rows are never
dropped for others, so all sessions together may hold at most half of the slots of the pool.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stretto.engine.engine import Progress, Stream
from stretto.engine.params import SamplingParams
from stretto.errors import CapacityError, InputError
from stretto.llm import LLM
from stretto.serving.protocol import UnknownSessionError
from stretto.session import Session, Thread

__all__ = ["Held"]


@dataclass(slots=True)
class _Entry:
    """``running``: request id -> slots that it may still take."""

    session: Session
    owner: str
    used: float
    running: dict[str, int] = field(default_factory=dict)

    def slots(self) -> int:
        """Slots of all threads, and those that running requests may take."""
        held = np.unique(np.concatenate([t.view.slots for t in self.session.threads()]))
        return len(held) + sum(self.running.values())

    def thread(self, number: int) -> Thread:
        threads = {t.id: t for t in self.session.threads()}
        if number not in threads:
            raise InputError(f"thread {number} is not in this session: it has {', '.join(map(str, threads))}")
        return threads[number]


def _wanted(lines: list[Thread], each: int) -> int:
    """Slots that ``lines`` may take: what is not cached of each, a line that several were forked from once."""
    own = sum(each + len(t.tokens) - max(len(t.view), t.start) for t in lines)
    below = {id(t.parent): t.start - len(t.parent.view) for t in lines if t.parent and len(t.view) < t.start}
    return own + sum(max(0, n) for n in below.values())


class Held:
    """``step`` runs one forward for everybody; ``give_up`` ends a request, with a reason for its client; ``most``:
    sessions at once; ``idle``: seconds without a message after which a session ends."""

    def __init__(
        self, llm: LLM, step: Callable[[], list[Progress]], give_up: Callable[[str, str], None], *, most: int = 16,
        idle: float = 300.0,
    ):
        self._llm, self._step, self._give_up, self.most, self.idle = llm, step, give_up, most, idle
        self._entries: dict[str, _Entry] = {}
        self._verbs: dict[str, Callable[..., dict[str, Any]]] = {
            "fork": self._fork, "join": self._join, "append": self._append, "truncate": self._truncate,
            "score": self._score, "end": self._end, "state": lambda entry: {},
        }

    def __len__(self) -> int:
        return len(self._entries)

    def do(self, verb: str, session: str, owner: str, **args: Any) -> dict[str, Any]:
        """One verb on a session; its state afterwards, with what the verb found."""
        if verb == "open":
            return self._open(session, owner, **args)
        entry = self._entry(session, owner)
        if verb == "close":
            found = self._state(entry)
            self._close(session, "its session was closed")
            return found
        found = self._verbs[verb](entry, **args)
        return self._state(entry) | found

    def gen(
        self, request: str, session: str, owner: str, threads: list[int], method: Any, params: SamplingParams
    ) -> tuple[list[Stream], Callable[[bool], None]]:
        """Start threads of a session together: their streams, and what to call when all have finished (True) or are
        given up (False: they stay where they were)."""
        entry = self._entry(session, owner)
        if len(set(threads)) < len(threads):
            raise InputError(f"threads {threads}: every thread once")
        lines = [entry.thread(n) for n in threads]
        most = _wanted(lines, params.max_tokens)
        self._room(most)
        jobs = [(t, method, params) for t in lines]
        streams = entry.session.submit(jobs)
        entry.running[request] = most

        def ended(finished: bool) -> None:
            entry.running.pop(request, None)
            entry.used = time.monotonic()
            if finished:
                ran = [s.seq.metrics for s in streams]
                feeds = [t.parent.feed.seq.metrics for t in lines if t.parent and t.parent.feed]
                before = max((m.prefill_forwards for m in feeds), default=0)  # of a line, before its children's first
                entry.session.usage.forwards += before + max(m.forwards + m.prefill_forwards for m in ran)
                entry.session.collect(jobs, streams)
            else:
                entry.session.abandon(jobs, streams)

        return streams, ended

    def expire(self, now: float) -> None:
        """End what was idle for too long."""
        for name in [n for n, e in self._entries.items() if not e.running and e.used + self.idle <= now]:
            self._close(name, "idle")

    def _entry(self, session: str, owner: str) -> _Entry:
        entry = self._entries.get(session)
        if entry is None or entry.owner != owner:
            raise UnknownSessionError(f"no session {session[:60]!r}: it was closed, idle for {self.idle:g} s, or never "
                                      "opened with this key")
        entry.used = time.monotonic()
        return entry

    def _open(self, session: str, owner: str, prompt: list[int], **limits: Any) -> dict[str, Any]:
        if len(self._entries) >= self.most:
            raise CapacityError(f"{len(self._entries)} sessions are open, at most {self.most} may be: close one")
        if len(prompt) >= self._llm.max_model_len:
            raise InputError(f"the prompt has {len(prompt)} tokens: fewer than {self._llm.max_model_len}, the context")
        self._room(len(prompt))
        made = Session(self._llm, prompt, step=self._step, **limits)
        self._entries[session] = entry = _Entry(made, owner, time.monotonic())
        return self._state(entry)

    def _close(self, session: str, why: str) -> None:
        entry = self._entries.pop(session)
        for request in list(entry.running):
            self._give_up(request, why)
        entry.session.end()

    def _room(self, more: int) -> None:
        limit = self._llm.runner.alloc.total // 2
        held = sum(e.slots() for e in self._entries.values())
        if held + more > limit:
            raise CapacityError(
                f"{more} slots more beside {held} that sessions hold or may take: together at most {limit}; close a "
                "session or lower max_tokens"
            )

    def _state(self, entry: _Entry) -> dict[str, Any]:
        s = entry.session
        return {
            "threads": [
                {"id": t.id, "parent": t.parent.id if t.parent else None, "tokens": len(t.tokens), "start": t.start,
                 "text": t.text, "busy": t.busy}
                for t in s.threads()
            ],
            "usage": {"evaluated": s.usage.evaluated, "generated": s.usage.generated,
                      "critical_path": s.usage.critical_path, "forwards": s.usage.forwards},
        }

    def _fork(self, entry: _Entry, thread: int, n: int | None, prefixes: list[Any] | None, positions: Any):
        line = entry.thread(thread)
        self._room(sum(map(len, prefixes)) if prefixes else 0)
        return {"children": [c.id for c in line.fork(n, prefixes=prefixes, positions=positions)]}

    def _join(
        self, entry: _Entry, thread: int, children: list[int], mode: str, order: Any, separator: Any, select: int
    ):
        line, kids = entry.thread(thread), [entry.thread(n) for n in children]
        if mode == "rotate":
            self._room(sum(len(k.own) for k in kids))
        return {"texts": line.join(kids, mode, order=order, separator=separator, select=select)}

    def _append(self, entry: _Entry, thread: int, text: Any):
        line = entry.thread(thread)
        if len(line.tokens) + len(entry.session.encode(text)) >= self._llm.max_model_len:
            raise InputError(f"thread {thread} would pass the context of {self._llm.max_model_len} tokens")
        line.append(text)
        return {}

    def _truncate(self, entry: _Entry, thread: int, length: int):
        entry.thread(thread).truncate(length)
        return {}

    def _score(self, entry: _Entry, thread: int, text: Any):
        line = entry.thread(thread)
        ids = entry.session.encode(text)
        self._room(len(ids))
        if len(line.tokens) + len(ids) >= self._llm.max_model_len:
            raise InputError(f"thread {thread} would pass the context of {self._llm.max_model_len} tokens")
        return {"token_ids": ids, "logprobs": line.score(ids)}

    def _end(self, entry: _Entry, thread: int):
        line = entry.thread(thread)
        if line is entry.session:
            raise InputError("thread 0 is the session itself: close the session")
        below: list[Thread] = [line]
        for t in below:
            below += t.children
        for t in below:
            t._check_open()
        line.end()
        return {}
