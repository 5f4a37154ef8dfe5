"""Lines that threads were forked from and that nobody has evaluated yet.

A late fork with forced prefixes costs no forward of its own: the line's rows go into the first forward of its children,
whose own rows see them there (``Method.rides``); where that has no room they start behind it, and for other methods it
is evaluated first. Either way that happens once.
"""

from __future__ import annotations

from typing import Any

from stretto.engine.feed import Feed
from stretto.engine.params import SamplingParams
from stretto.engine.types import Lease, Sequence

__all__ = ["Stems"]

Thread = Any  # session.Thread, which imports this


class Stems:
    """The lines of a session that are being evaluated for their children (``Thread.feed``)."""

    def __init__(self, session: Any):
        self.session = session
        self._fed: list[Thread] = []

    def before(self, thread: Thread, method: Any) -> Sequence | None:
        """The sequence that evaluates the line that ``thread`` was forked from. None where its rows are there, and then
        lent to the thread, or where it has to evaluate them itself (the line went on since, or has overlaps)."""
        line = thread.parent
        if line is None or not thread.start < len(thread.tokens) or len(thread.view) >= thread.start:
            return None
        if thread.shift or line.shift or line.busy or not line.alive:
            return None
        if isinstance(method, Feed) and len(thread.tokens) - method.wanted < thread.start:
            return None  # it wants rows of the line itself
        if not getattr(method, "rides", False) and line.feed is None and len(line.tokens) == thread.start:
            self.session.evaluate(line)
        if line.feed is None and len(line.view) >= thread.start:
            thread.view.adopt(line.view)
            thread.view.truncate(thread.start)
        elif line.feed is None and len(line.tokens) == thread.start:
            lease = Lease(line.view, path=line.path, plain=line.plain)
            (line.feed,) = self.session.llm.engine.add(
                line.tokens, SamplingParams(max_tokens=1), Feed(), priority=self.session.priority,
                salt=self.session.salt, lease=lease,
            )  # fmt: skip
            self._fed.append(line)
        return None if line.feed is None else line.feed.seq

    def settle(self) -> None:
        """Put what was evaluated into the session's account."""
        for line in list(self._fed):
            if line.feed.finish_reason is not None:
                self.session.usage.evaluated += line.feed.seq.metrics.rows
                line.view.truncate(min(len(line.view), len(line.tokens)))
                line.feed = None
                self._fed.remove(line)

    def abandon(self, children: list[Thread]) -> None:
        """Give up what only ``children`` wait for."""
        lines = {id(c.parent) for c in children}
        for line in self._fed:
            if id(line) in lines:
                self.session.llm.engine.abort(line.feed)
        self.settle()
