"""Threads of one prompt over shared K/V: ``with llm.session(prompt) as s``, fork, join, truncate, score.

A thread is a line of tokens and a view of what of it is cached; a fork copies slot numbers, never keys. Threads of one
session (a group) share a budget and an account: tokens evaluated, forwards, and the critical path (the longest chain of
tokens that had to be generated one after the other). Positions of a child go on where its parent stood (the same for
all siblings), or start at a number of their own. Source: fork/join as in SGLang's frontend and Multiverse.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from stretto.account import Event, Generated, Usage
from stretto.engine.cache import View
from stretto.engine.engine import Progress, Stream
from stretto.engine.feed import Feed
from stretto.engine.params import SamplingParams
from stretto.engine.team import Team
from stretto.engine.types import Lease
from stretto.errors import CapacityError, InputError, OptionError
from stretto.joins import join
from stretto.stems import Stems

__all__ = ["Children", "Session", "Thread"]

Text = str | Seq[int]


@dataclass(eq=False)
class Thread:
    """One line of text of a session.

    ``tokens`` [n]: the whole line as it is read; ``view``: cached rows of the first of them; ``start``: where the
    thread's own tokens begin; ``shift``: position of a token minus its place in ``tokens``, for tokens to come;
    ``path``: which branch this is; ``depth``: generated tokens of the longest chain that leads here; ``reads``: lines
    that it reads before its own, ``team``: the lines that it goes forward with (``shared.Shared`` sets both);
    ``feed``: what evaluates the line for the thread's children.
    """

    session: Session
    id: int
    tokens: list[int]
    view: View
    parent: Thread | None = None
    start: int = 0
    shift: int = 0
    path: tuple[int, ...] = ()
    plain: bool = True
    depth: int = 0
    alive: bool = True
    children: list[Thread] = field(default_factory=list)
    busy: bool = False
    gens: int = 0
    reads: tuple[Thread, ...] = ()
    team: Team | None = None
    feed: Stream | None = None

    @property
    def own(self) -> list[int]:
        """The thread's tokens since its fork."""
        return self.tokens[self.start :]

    @property
    def text(self) -> str:
        """The thread's text since its fork, special tokens included."""
        return self.session.llm.tokenizer.decode(self.own, skip_special_tokens=False)

    def append(self, text: Text) -> Thread:
        """Put forced tokens behind the line; they are evaluated with the next ``gen``."""
        self._check_open()
        self.tokens += self.session.encode(text)
        return self

    def gen(
        self, sampling_params: SamplingParams | None = None, *, method: str = "ar",
        options: Mapping[str, Any] | None = None, **params: Any,
    ) -> Generated:
        """Generate behind the line; stop tokens stay in it. Keywords are those of SamplingParams (greedy unless a
        temperature is given)."""
        return Children([self]).gen(sampling_params, method=method, options=options, **params)[0]

    async def agen(self, *args: Any, **kwargs: Any) -> Generated:
        """``gen`` for asyncio: several at once share forwards."""
        return (await Children([self]).agen(*args, **kwargs))[0]

    def fork(
        self, n: int | None = None, *, prefixes: Seq[Text] | None = None, positions: Literal["same"] | int = "same",
        late: bool = False,
    ) -> Children:
        """``n`` children, or one for each forced prefix. Nothing is copied; the line up to here is evaluated once.

        ``positions``: "same" = the children go on at this thread's next position; a number = they start there.
        ``late``: a line that is not cached yet goes into the first forward of children with prefixes (``stems.py``).
        Raises OptionError for a count below 1, CapacityError beyond the session's budget of threads.
        """
        self._check_open()
        if (n is None) == (prefixes is None):
            raise OptionError("fork", (n, prefixes), "either n or prefixes")
        texts = [[] for _ in range(n)] if n is not None else [self.session.encode(p) for p in prefixes or ()]
        if not texts or (n is not None and n < 1):
            raise OptionError("n", n, "at least one child")
        self.session.check_width(len(texts))
        several = len(texts) > 1 and len(self.tokens) - len(self.view) > 1
        late = late and any(texts) and not self.shift and not self.reads
        if positions != "same" or (not late and (several or any(texts))):
            self.session.evaluate(self)
        children = []
        for i, tokens in enumerate(texts):
            shift = self.shift if positions == "same" else int(positions) - len(self.tokens)
            child = Thread(
                self.session, self.session.next_id(), [*self.tokens, *tokens], self.view.fork(), self,
                len(self.tokens), shift, (*self.path, self.gens, len(self.children) + i),
                self.plain and positions == "same", self.depth,
            )
            children.append(child)
        self.children += children
        return Children(children)

    def join(
        self, children: Seq[Thread], mode: str = "reencode", *, order: Literal["index", "finish"] | Seq[int] = "index",
        separator: Text | None = None, select: int = 0,
    ) -> list[str]:
        """End ``children`` (forks of this thread) and take over what they wrote; their texts, in order.

        share: their rows are listed behind this line as they are, at the positions they have, and the line goes on
        behind the furthest of them (exact where the model was trained so). reencode: their tokens follow one another
        and are evaluated anew from the second on (equals plain decoding of the joined text). rotate: their keys are
        turned to contiguous positions, values stay (an approximation). gather: only the texts are returned. select:
        child number ``select`` of the list goes on as this thread.
        ``separator`` is put between and behind them (share, reencode, rotate: once, behind all, for share).
        """
        return join(self, list(children), mode, order, separator, select)

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on. Raises InputError below the fork point of a living child."""
        self._check_open()
        floor = max([c.start for c in self.children], default=0)
        if not floor <= length <= len(self.tokens) or length < 1:
            raise InputError(
                f"thread {self.id} has {len(self.tokens)} tokens and {len(self.children)} living children, forked at "
                f"{floor}: truncate to between {max(floor, 1)} and {len(self.tokens)}, not {length}"
            )
        if self.shift and length < len(self.view):
            raise InputError(f"thread {self.id} cannot be cut inside what a join brought: its positions overlap there")
        del self.tokens[length:]
        self.view.truncate(min(length, len(self.view)))

    def score(self, text: Text) -> list[float]:
        """Log-probabilities of the tokens of ``text`` behind this line; the line itself stays as it is."""
        self._check_open()
        ids = self.session.encode(text)
        if not ids:
            return []
        (child,) = self.fork(1)
        child.tokens += ids
        feed = Feed(len(ids) + 1)
        child.view.truncate(min(len(child.view), len(self.tokens) - 1))
        self.session.run([(child, feed, SamplingParams(max_tokens=1))])
        self._drop(child)
        law = torch.log_softmax(feed.logits[:-1].double(), -1)
        return law[torch.arange(len(ids)), torch.tensor(ids)].tolist()

    def end(self) -> None:
        """Give the thread's rows back, and those of its children; idempotent."""
        for child in list(self.children):
            child.end()
        if self.alive:
            self.alive = False
            self.view.release()
            if self.parent is not None:
                self.parent.children.remove(self)

    def _drop(self, child: Thread) -> None:
        child.end()

    def _check_open(self) -> None:
        if not self.alive:
            raise InputError(f"thread {self.id} has ended (joined, or its session was closed)")
        if self.busy or (self.feed is not None and self.feed.finish_reason is None):
            raise InputError(f"thread {self.id} is generating: wait for it first")


class Children(list[Thread]):
    """Threads that act together: their forwards are shared."""

    def gen(
        self, sampling_params: SamplingParams | Seq[SamplingParams] | None = None, *, method: str = "ar",
        options: Mapping[str, Any] | None = None, **params: Any,
    ) -> list[Generated]:
        """``gen`` of every thread at once; one SamplingParams for all or one each."""
        session, jobs = self._jobs(sampling_params, method, options, params)
        return session.run(jobs)

    async def agen(self, sampling_params: Any = None, *, method: str = "ar", options: Any = None, **params: Any):
        """``gen`` for asyncio."""
        session, jobs = self._jobs(sampling_params, method, options, params)
        return await session.arun(jobs)

    def stream(
        self, sampling_params: SamplingParams | Seq[SamplingParams] | None = None, *, method: str = "ar",
        options: Mapping[str, Any] | None = None, **params: Any,
    ) -> Iterator[Event]:
        """``gen`` whose news arrive step by step, those of several threads interleaved."""
        session, jobs = self._jobs(sampling_params, method, options, params)
        return session.events(jobs)

    def _jobs(self, given: Any, method: str, options: Any, params: dict[str, Any]):
        if not self:
            raise InputError("no thread was given")
        session = self[0].session
        made = session.llm.method(method, options)
        if isinstance(given, (list, tuple)):
            if len(given) != len(self) or params:
                raise OptionError("sampling_params", f"{len(given)} values", f"one, or one for each of {len(self)}")
            each = list(given)
        else:
            base = given or SamplingParams.make(**{"temperature": 0.0, **params})
            each = [replace(base, **params) if given and params else base for _ in self]
        return session, [(t, made, p) for t, p in zip(self, each, strict=True)]


class Session(Thread):
    """The first thread of a group, and the group itself; a context manager. Made by ``LLM.session``.

    ``max_threads``: living threads at once; ``max_evaluated``, ``max_path``: budgets in evaluated tokens and in tokens
    of the critical path; a ``gen`` that finds one used up raises CapacityError, and max_tokens is cut to the path's.
    ``step``: what runs a forward, where somebody else must see the progress of all streams (default: the engine's).
    """

    def __init__(
        self, llm: Any, prompt: Text, *, salt: str = "", priority: int = 0, max_threads: int = 64,
        max_evaluated: int | None = None, max_path: int | None = None,
        step: Callable[[], list[Progress]] | None = None,
    ):
        self.llm, self.usage, self._step = llm, Usage(), step or llm.engine.step
        self.salt, self.priority = salt, priority
        self.max_threads, self.max_evaluated, self.max_path = max_threads, max_evaluated, max_path
        self._count, self.stems = 0, Stems(self)
        ids = self.encode(prompt)
        super().__init__(self, 0, ids, View(llm.runner.alloc))
        if llm.config.attention != "causal":
            raise InputError(f"sessions need a model with causal attention; this one has {llm.config.attention!r}")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.end()

    def encode(self, text: Text) -> list[int]:
        return self.llm.tokenizer.encode(text) if isinstance(text, str) else [int(t) for t in text]

    def next_id(self) -> int:
        self._count += 1
        return self._count

    def threads(self) -> list[Thread]:
        """All living threads, this one first."""
        out: list[Thread] = [self]
        for t in out:
            out += t.children
        return out

    def check_width(self, more: int) -> None:
        living = len(self.threads())
        if living + more > self.max_threads:
            raise CapacityError(
                f"{more} more threads beside {living}: the session allows {self.max_threads} (max_threads)"
            )

    def evaluate(self, *threads: Thread) -> None:
        """Cache every token of the threads now, in one forward."""
        if jobs := self.pending(*threads):
            self.run(jobs)

    def pending(self, *threads: Thread) -> list[tuple[Thread, Any, SamplingParams]]:
        """The jobs that ``evaluate`` runs."""
        return [(t, Feed(), SamplingParams(max_tokens=1)) for t in threads if len(t.view) < len(t.tokens)]

    def run(self, jobs: list[tuple[Thread, Any, SamplingParams]]) -> list[Generated]:
        """Run all jobs (thread, method, parameters) in shared forwards."""
        for _ in self.events(jobs):
            pass
        return self._results

    async def arun(self, jobs: list[tuple[Thread, Any, SamplingParams]]) -> list[Generated]:
        """``run`` that lets other tasks of the event loop put their rows into the same forwards.

        Of the tasks that wait, whoever finds that nothing ran while the others had their turn steps the engine: one
        forward a round, so that a task whose threads ended goes on before the next one.
        """
        engine, streams = self.llm.engine, self.submit(jobs, text=False)
        try:
            while True:
                seen = engine.forwards
                await asyncio.sleep(0)
                ran = engine.forwards - seen
                self.usage.forwards += ran
                if all(s.finish_reason is not None for s in streams):
                    return self.collect(jobs, streams)
                if not ran:
                    self._step()
                    self.usage.forwards += 1
        finally:
            self.abandon(jobs, streams)

    def events(self, jobs: list[tuple[Thread, Any, SamplingParams]]) -> Iterator[Event]:
        """``run``, step by step. Leaving the iterator early aborts what still runs."""
        streams = self.submit(jobs, text=False)
        of = {stream: thread.id for stream, (thread, _, _) in zip(streams, jobs, strict=True)}
        try:
            while any(s.finish_reason is None for s in streams):
                for news in self._step():
                    if news.stream in of:
                        yield Event(of[news.stream], news.tokens, news.finish_reason)
                self.usage.forwards += 1
            self._results = self.collect(jobs, streams)
        finally:
            self.abandon(jobs, streams)

    def submit(self, jobs: list[tuple[Thread, Any, SamplingParams]], *, text: bool = True) -> list[Stream]:
        """Queue the jobs; who steps the engine himself calls ``collect`` when all have finished, or ``abandon``.
        ``text``: whether somebody reads the streams' text as it grows."""
        streams: list[Stream] = []
        self.stems.settle()
        try:
            for thread, method, params in jobs:
                thread._check_open()
                if thread.shift and len(thread.view) >= len(thread.tokens):
                    raise InputError(f"thread {thread.id} ends in joined rows: append a token (a separator) before gen")
                params = self._budget(thread, method, params)
                constraint = self.llm.constraint(params)
                thread.view.truncate(min(len(thread.view), len(thread.tokens) - 1))
                reads = tuple(t.view for t in thread.reads)
                path = (*thread.path, thread.gens)
                behind = self.stems.before(thread, method)
                lease = Lease(thread.view, thread.shift, path, thread.plain, reads, thread.team, behind)
                streams += self.llm.engine.add(
                    thread.tokens, params, method, priority=self.priority, salt=self.salt, constraint=constraint,
                    decode_text=text, lease=lease,
                )
                thread.busy = True
        except BaseException:
            self.abandon(jobs, streams)
            raise
        return streams

    def _budget(self, thread: Thread, method: Any, params: SamplingParams) -> SamplingParams:
        if params.n != 1:
            raise OptionError("n", params.n, "1 in a session: fork instead")
        if self.max_evaluated is not None and self.usage.evaluated >= self.max_evaluated:
            raise CapacityError(f"{self.usage.evaluated} tokens were evaluated: max_evaluated={self.max_evaluated}")
        if self.max_path is None or isinstance(method, Feed):
            return params
        left = self.max_path - thread.depth
        if left < 1:
            raise CapacityError(f"thread {thread.id} has a path of {thread.depth} tokens: max_path={self.max_path}")
        return replace(params, max_tokens=min(left, params.max_tokens))

    def collect(self, jobs: list[tuple[Thread, Any, SamplingParams]], streams: list[Stream]) -> list[Generated]:
        """The threads take over what their finished streams generated."""
        out = []
        self.stems.settle()
        for (thread, method, params), stream in zip(jobs, streams, strict=True):
            seq = stream.seq
            new = seq.tokens[seq.prompt_len :]
            thread.busy = False
            thread.tokens = list(seq.tokens)
            thread.view.truncate(min(len(thread.view), len(thread.tokens)))
            thread.depth += len(new)
            thread.gens += not isinstance(method, Feed)
            self.usage.evaluated += seq.metrics.rows
            self.usage.generated += len(new)
            self.usage.critical_path = max(self.usage.critical_path, thread.depth)
            text = stream.stops.finish() if stream.stops.reads else self.llm.tokenizer.decode(
                new, skip_special_tokens=params.skip_special_tokens
            )
            out.append(Generated(thread.id, text, new, stream.finish_reason, seq.logprobs, seq.metrics))
        return out

    def abandon(self, jobs: list[tuple[Thread, Any, SamplingParams]], streams: list[Stream]) -> None:
        """Abort what still runs; the threads stay where they were before."""
        for (thread, _, _), stream in zip(jobs, streams, strict=False):
            if thread.busy:
                self.llm.engine.abort(stream)
                thread.busy = False
                thread.view.truncate(min(len(thread.view), len(thread.tokens)))
        self.stems.abandon([thread for thread, _, _ in jobs])
