"""Lines that are read while they are written: threads of one session over one live cache (Hogwild, 2025).

A *line* is a thread whose tokens stand at positions 0, 1, 2, ... of its own. What a writer reads is a list of whole
lines, its own last; every reader has its own order, and a line's place in it is a rotation of the reader's query, so no
key is ever copied. Writers go forward together: one forward adds a token to each of them, and each sees the tokens that
the others were given in that very forward. ``move`` ends a piece of one line and puts it behind another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

from stretto.account import Generated
from stretto.engine.cache import View
from stretto.engine.engine import Stream
from stretto.engine.params import SamplingParams
from stretto.engine.team import Team, check_model
from stretto.errors import CapacityError, InputError
from stretto.joins import turn_keys
from stretto.session import Session, Text, Thread

__all__ = ["News", "Shared"]


@dataclass(slots=True)
class News:
    """What a forward did for one writer: its new tokens, and the result if it stopped."""

    line: Thread
    token_ids: list[int]
    done: Generated | None


class Shared:
    """The lines of ``session`` that read each other. Its own line, the prompt, is the first that others may read.

    Raises UnsupportedError for a model whose keys cannot be read from several distances. Lines end with the session.
    """

    def __init__(self, session: Session):
        check_model(session.llm.runner)
        if session.shift or session.parent is not None:
            raise InputError("lines can be shared in a session that has not joined anything yet")
        self.session, self.team = session, Team()
        self._live: dict[Thread, tuple[Any, Stream, int]] = {}  # line -> (job, stream, tokens already told)
        session.evaluate(session)

    def line(self, text: Text, reads: Seq[Thread] = ()) -> Thread:
        """A new line with these forced tokens (at least one before it is written or read). ``reads``: see ``read``."""
        session = self.session
        session.check_width(1)
        number = len(session.children)
        made = Thread(
            session, session.next_id(), session.encode(text), View(session.llm.runner.alloc), session,
            path=(*session.path, session.gens, number), plain=False, depth=session.depth,
        )
        session.children.append(made)
        self.read(made, reads)
        return made

    def read(self, line: Thread, reads: Seq[Thread]) -> None:
        """What ``line`` sees before itself from the next forward on, in this order."""
        for other in reads:
            if other.session is not self.session or not other.alive or other is line:
                raise InputError(f"thread {line.id} cannot read thread {other.id}: no other line of its session")
        line.reads = tuple(reads)
        if line in self._live:
            self._live[line][1].seq.reads = tuple(t.view for t in reads)

    def evaluate(self, line: Thread) -> None:
        """Cache all tokens of a line that nobody writes: a header, a remark."""
        self.session.evaluate(line)

    def start(self, line: Thread, params: SamplingParams, method: Any = None) -> None:
        """Let ``line`` be written until its parameters stop it. Others that run wait for its next row.

        ``method``: one whose rows all stay (default: ``ar``), since others see them at once.
        """
        session = self.session
        method = method or session.llm.method("ar")
        longest, limit = self.length(line) + 1, session.llm.host.max_model_len
        if longest > limit:
            raise CapacityError(
                f"thread {line.id} would read {longest} tokens: at most {limit} (max_model_len); a line's view holds "
                "everybody's tokens"
            )
        params = replace(params, max_tokens=min(params.max_tokens, limit - longest + 1))
        if len(line.tokens) - len(line.view) > session.llm.engine.scheduler.max_rows // 2:
            session.evaluate(line)
        line.team = self.team
        job = (line, method, params)
        (stream,) = session.submit([job])
        self._live[line] = (job, stream, stream.seq.prompt_len)
        self.team.size += 1

    def length(self, line: Thread) -> int:
        """Tokens that ``line`` sees, its own included."""
        return sum(len(t.tokens) for t in line.reads) + len(line.tokens)

    @property
    def writers(self) -> list[Thread]:
        """Lines that are being written."""
        return list(self._live)

    def step(self) -> list[News]:
        """One forward; what it did for every writer."""
        self.session._step()
        self.session.usage.forwards += 1
        return self._news()

    async def astep(self) -> list[News]:
        """``step`` for asyncio: other sessions' rows share the forward, whoever runs it."""
        engine = self.session.llm.engine
        seen = engine.forwards
        await asyncio.sleep(0)
        if engine.forwards == seen:
            self.session._step()
        self.session.usage.forwards += engine.forwards - seen
        return self._news()

    def _news(self) -> list[News]:
        news = []
        for line, (job, stream, told) in list(self._live.items()):
            new = stream.seq.tokens[told:]
            done = None
            if stream.finish_reason is not None:
                (done,) = self.session.collect([job], [stream])
                self._leave(line)
            else:
                self._live[line] = (job, stream, told + len(new))
                line.tokens += new
            if new or done:
                news.append(News(line, new, done))
        return news

    def stop(self) -> None:
        """Stop everybody who writes; what was written stays."""
        for line, (job, stream, _) in list(self._live.items()):
            self.session.llm.engine.abort(stream)
            self.session.collect([job], [stream])
            self._leave(line)

    def _leave(self, line: Thread) -> None:
        del self._live[line]
        self.team.size -= 1
        line.team = None

    def move(self, line: Thread, to: Thread, keep: int = 0) -> list[int]:
        """Put the rows of ``line`` behind the line ``to`` (keys turned in place, values untouched), all but its last
        ``keep`` tokens, which are dropped with the rest: ``line`` is empty afterwards. The tokens that moved.

        An approximation: the rows were computed where they stood before. Both lines must rest.
        """
        line._check_open()
        to._check_open()
        n = len(line.tokens) - keep
        if not 0 < n <= len(line.view) or len(to.view) < len(to.tokens):
            raise InputError(
                f"thread {line.id} has {len(line.view)} cached rows and thread {to.id} {len(to.view)} of "
                f"{len(to.tokens)}: {n} rows cannot be moved"
            )
        moved, line.view = line.tokens[:n], _cut(line.view, n)
        turn_keys(self.session.llm.runner, line.view.slots, line.view.slots, len(to.tokens))
        to.view.join(line.view, 0)
        to.tokens += moved
        to.plain = False
        line.view.release()
        line.tokens = []
        return moved


def _cut(view: View, length: int) -> View:
    view.truncate(length)
    return view
