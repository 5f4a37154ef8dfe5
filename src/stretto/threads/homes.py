"""A model at home: its engine on a thread and an event loop of its own, so that two models' forwards overlap.

The engine's forwards leave the interpreter lock; what touches a home's sessions runs on its loop and nowhere else. Work
comes from coroutines of any other loop; those that wait at the same time share forwards, one forward a turn of the
loop. ``limit``: jobs that may run at the same time, the rest waits in order of arrival.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from stretto.account import Generated
from stretto.engine.feed import Feed
from stretto.engine.params import SamplingParams
from stretto.errors import OptionError
from stretto.session import Session, Thread

__all__ = ["Home", "at_home", "together"]

T = TypeVar("T")
Job = tuple[Thread, Any, SamplingParams]
SWITCH = 1e-4  # seconds after which a waiting thread gets the interpreter; 5 ms would be many forwards
ONCE = SamplingParams(max_tokens=1)


class Home:
    """``seconds``: spent in forwards; ``generated``, ``scored``: tokens. Closed by ``close``; see ``at_home``."""

    def __init__(self, llm: Any, limit: int):
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise OptionError("limit", limit, "a whole number from 1: jobs of a model at the same time")
        self.llm, self.limit = llm, limit
        self.seconds, self.forwards, self.generated, self.scored = 0.0, 0, 0, 0
        self._waiting: list[tuple[Seq[Any], asyncio.Future]] = []
        self._tasks: dict[Session, set[asyncio.Task]] = {}
        self._gate = asyncio.Semaphore(limit)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stretto-home", daemon=True)
        self._thread.start()

    async def open(self, prompt: Any, threads: int) -> Session:
        """A session on ``prompt``, evaluated once, with room for ``threads`` living threads."""
        session = await self.call(lambda: Session(self.llm, prompt, max_threads=threads + 1))
        await self.run(session, [(session, Feed(), ONCE)])
        return session

    async def call(self, work: Callable[[], T]) -> T:
        """A plain function (fork, truncate, append, end) on the home's thread, between two forwards."""

        async def alone() -> T:
            return work()

        return await self._there(alone())

    async def gen(self, thread: Thread, params: SamplingParams) -> Generated:
        return (await self.gen_each([(thread, params)]))[0]

    async def gen_each(self, pairs: Seq[tuple[Thread, SamplingParams]]) -> list[Generated]:
        """One job in which threads of one session go on with plain decoding; it ends when the last of them has."""
        method = self.llm.method("ar")
        out = await self.run(pairs[0][0].session, [(t, method, p) for t, p in pairs])
        self.generated += sum(len(g.token_ids) for g in out)
        return out

    async def score(self, thread: Thread, ids: Seq[int]) -> list[float]:
        """Append ``ids`` and evaluate them, nothing else: their log-probabilities. Their rows stay cached."""
        return (await self.score_all([(thread, ids)]))[0]

    async def score_all(self, pairs: Seq[tuple[Thread, Seq[int]]]) -> list[list[float]]:
        """``score`` of many threads of one session, in shared forwards."""

        def jobs() -> list[Job]:
            out = []
            for thread, ids in pairs:
                thread.view.truncate(min(len(thread.view), len(thread.tokens) - 1))
                thread.append(ids)
                out.append((thread, Feed(len(ids) + 1), ONCE))
            return out

        session = pairs[0][0].session

        async def scored() -> list[list[float]]:
            made = jobs()
            await self._run(session, made)
            self.scored += sum(len(ids) for _, ids in pairs)
            return [_laws(feed.logits, ids) for (_, feed, _), (_, ids) in zip(made, pairs, strict=True)]

        return await self._there(scored(), session)

    async def run(self, session: Session, jobs: list[Job]) -> list[Generated]:
        """Jobs of one session as one unit: started together, done when all are. Cancelling it aborts them."""
        return await self._there(self._run(session, jobs), session)

    async def end(self, session: Session) -> None:
        """Abort what still runs of a session and give its rows back."""

        async def over() -> None:
            left = self._tasks.pop(session, set())
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            session.end()

        await self._there(over())

    def close(self) -> None:
        """End all sessions that are left, then the thread."""

        async def all_over() -> None:
            for session in list(self._tasks):
                left = self._tasks.pop(session)
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)
                session.end()
            others = asyncio.all_tasks() - {asyncio.current_task()}  # ends that their caller no longer waits for
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(all_over(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _there(self, work: Coroutine[Any, Any, T], session: Session | None = None) -> T:
        async def known() -> T:
            task = asyncio.current_task()
            assert task is not None
            if session is not None:
                self._tasks.setdefault(session, set()).add(task)
            try:
                return await work
            finally:
                if session is not None:
                    self._tasks.get(session, set()).discard(task)

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(known(), self._loop))

    async def _run(self, session: Session, jobs: list[Job]) -> list[Generated]:
        async with self._gate:
            streams = session.submit(jobs)
            try:
                done = self._loop.create_future()
                self._waiting.append((streams, done))
                if len(self._waiting) == 1:
                    self._loop.call_soon(self._turn)
                await done
                return session.collect(jobs, streams)
            finally:
                self._waiting = [w for w in self._waiting if w[0] is not streams]
                session.abandon(jobs, streams)

    def _turn(self) -> None:
        """One forward for everybody who waits; those whose streams have ended go on before the next one."""
        if not self._waiting:
            return
        start = time.perf_counter()
        try:
            self.llm.engine.step()
        except BaseException as e:
            for _, done in self._waiting:
                if not done.done():
                    done.set_exception(e)
            self._waiting = []
            return
        self.seconds += time.perf_counter() - start
        self.forwards += 1
        left = []
        for streams, done in self._waiting:
            if all(s.finish_reason is not None for s in streams):
                if not done.done():
                    done.set_result(None)
            else:
                left.append((streams, done))
        self._waiting = left
        if left:
            self._loop.call_soon(self._turn)


def _laws(logits: torch.Tensor, ids: Seq[int]) -> list[float]:
    """log p of ``ids`` under rows [len(ids) + 1, V] of which the first stands before them."""
    rows = logits[:-1].double()
    chosen = rows[torch.arange(len(ids)), torch.tensor(list(ids))]
    return (chosen - torch.logsumexp(rows, -1)).tolist()


@contextmanager
def at_home(*models: tuple[Any, int]) -> Iterator[list[Home]]:
    """A home for each (model, limit); the same model twice has one home. All threads end with the block."""
    before, homes = sys.getswitchinterval(), {}
    try:
        for llm, limit in models:
            if id(llm) not in homes:
                homes[id(llm)] = Home(llm, limit)
        if len(homes) > 1:
            sys.setswitchinterval(min(before, SWITCH))
        yield [homes[id(llm)] for llm, _ in models]
    finally:
        sys.setswitchinterval(before)
        for home in homes.values():
            home.close()


async def together(work: Seq[Awaitable[T]]) -> list[T]:
    """The results of all; the first error cancels the rest, waits for it, and is raised."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
