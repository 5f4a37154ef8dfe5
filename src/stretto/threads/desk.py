"""Where an orchestration's calls go out: limits, retries, the trace, and the queue of what is ready.

One desk serves one orchestration. Nothing waits for ever: a call has a time limit, an orchestration has limits on
calls, tokens and seconds, and what is under way when one is reached is cancelled.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import time
from collections.abc import Callable, Coroutine, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from stretto.errors import CapacityError, OptionError
from stretto.threads.agents import Agent, Reply, worth_retrying

__all__ = ["Call", "Desk", "Limits", "run_ready"]

Unit = TypeVar("Unit", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """``max_calls``, ``max_tokens`` (completion tokens of all calls), ``timeout`` (seconds in all): hard limits, None =
    none. ``call_timeout``: seconds of one try; ``retries``: more tries after the first; ``backoff``: seconds before the
    second, doubled before each further one; ``max_live``: calls at the same time; ``call_tokens``: longest answer of
    one sub-task; ``max_subtasks``: of a task."""

    max_calls: int | None = 400
    max_tokens: int | None = None
    timeout: float | None = 300.0
    call_timeout: float = 60.0
    retries: int = 1
    backoff: float = 0.2
    max_live: int = 16
    call_tokens: int = 160
    max_subtasks: int = 50

    def __post_init__(self) -> None:
        for name in ("max_calls", "max_tokens", "timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise OptionError(name, value, "a number above 0, or None for no limit")
        for name in ("call_timeout", "max_live", "call_tokens", "max_subtasks"):
            if getattr(self, name) <= 0:
                raise OptionError(name, getattr(self, name), "a number above 0")
        for name in ("retries", "backoff"):
            if getattr(self, name) < 0:
                raise OptionError(name, getattr(self, name), "a number from 0")


@dataclass(slots=True)
class Call:
    """One line of the trace. ``start``, ``end``: seconds since the orchestration began; ``after``: numbers of the calls
    whose texts it read; ``error``: why it gave nothing, if so; ``evaluated``: tokens computed for it, where known."""

    number: int
    role: str
    ids: tuple[str, ...]
    round: int
    agent: str
    prompt_hash: str
    start: float
    after: tuple[int, ...] = ()
    end: float = 0.0
    tries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    evaluated: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    text: str = ""


@dataclass
class Desk:
    """``agents``: who is asked, in turns."""

    agents: Sequence[Agent]
    limits: Limits
    common: str = ""
    trace: list[Call] = field(default_factory=list)
    round: int = 0
    tries: int = 0
    started: float = field(default_factory=time.perf_counter)
    _reserved: int = 0
    _freed: asyncio.Event = field(default_factory=asyncio.Event)

    def now(self) -> float:
        return time.perf_counter() - self.started

    @property
    def tokens(self) -> int:
        return sum(c.completion_tokens for c in self.trace)

    async def ask(
        self, role: str, ids: Sequence[str], text: str, *, tokens: int, after: Sequence[int] = (),
    ) -> Call:
        """One call, tried again where that may help. Its ``error`` says when it gave nothing; a limit of the whole
        orchestration raises CapacityError."""
        number = len(self.trace)
        agent = self.agents[number % len(self.agents)]
        digest = hashlib.sha256(f"{self.common}\n{text}".encode()).hexdigest()[:16]
        call = Call(number, role, tuple(ids), self.round, agent.name, digest, self.now(), tuple(after))
        self.trace.append(call)
        try:
            while not await self._try(agent, call, text, tokens):
                await asyncio.sleep(self.limits.backoff * 2 ** (call.tries - 1))
        finally:
            call.end = self.now()
        return call

    async def _try(self, agent: Agent, call: Call, text: str, tokens: int) -> bool:
        """One try; False = try again."""
        tokens = await self._reserve(tokens)
        self.tries += 1
        call.tries += 1
        left = self.limits.call_timeout
        if self.limits.timeout is not None:
            left = min(left, self.limits.timeout - self.now())
        try:
            reply: Reply = await asyncio.wait_for(agent.ask(text, max_tokens=tokens, seed=call.tries - 1), left)
        except Exception as e:  # an agent of the user's may raise anything; the sub-task then counts as failed
            call.error = str(e) or f"no answer within {left:.3g} s"
            return call.tries > self.limits.retries or not worth_retrying(e)
        finally:
            self._reserved -= tokens
            self._freed.set()
        call.text, call.error, call.finish_reason = reply.text, None, reply.finish_reason
        call.prompt_tokens, call.completion_tokens = reply.prompt_tokens, reply.completion_tokens
        call.evaluated = reply.evaluated
        return True

    async def _reserve(self, tokens: int) -> int:
        """How many of ``tokens`` a try may generate; waits while calls under way might use up all that are left."""
        self._check()
        if self.limits.max_tokens is not None:
            while (left := self.limits.max_tokens - self.tokens - self._reserved) <= 0:
                self._freed.clear()
                await self._freed.wait()
                self._check()
            tokens = min(tokens, left)
        self._reserved += tokens
        return tokens

    def _check(self) -> None:
        limits = self.limits
        if limits.max_calls is not None and self.tries >= limits.max_calls:
            raise CapacityError(f"{self.tries} calls were made: max_calls={limits.max_calls}")
        if limits.max_tokens is not None and self.tokens >= limits.max_tokens:
            raise CapacityError(f"{self.tokens} tokens were generated: max_tokens={limits.max_tokens}")
        if limits.timeout is not None and self.now() >= limits.timeout:
            raise CapacityError(f"{self.now():.1f} s have passed: timeout={limits.timeout:g}")

    def fits(self, text: str, tokens: int) -> bool:
        """Whether every agent has room for it."""
        return all(a.fits(text, tokens) for a in self.agents)

    def path(self, value: Callable[[Call], float]) -> float:
        """The largest sum of ``value`` along calls that waited for one another."""
        total: list[float] = []
        for call in self.trace:
            total.append(value(call) + max((total[i] for i in call.after), default=0.0))
        return max(total, default=0.0)


async def run_ready(
    needs: Mapping[Unit, Sequence[Unit]], priority: Mapping[Unit, float],
    work: Callable[[Unit], Coroutine[Any, Any, None]], *, max_live: int,
) -> None:
    """Run ``work`` of every unit once, after the units it ``needs``, at most ``max_live`` at a time; of those that are
    ready the one with the highest ``priority`` first (of equals the first of ``needs``). An error cancels the rest."""
    place = {u: i for i, u in enumerate(needs)}
    missing = {u: len(before) for u, before in needs.items()}
    after: dict[Unit, list[Unit]] = {u: [] for u in needs}
    for u, before in needs.items():
        for b in before:
            after[b].append(u)
    ready = [(-priority[u], place[u], u) for u, m in missing.items() if not m]
    heapq.heapify(ready)
    running: dict[asyncio.Task[None], Unit] = {}
    try:
        while ready or running:
            while ready and len(running) < max_live:
                unit = heapq.heappop(ready)[2]
                running[asyncio.ensure_future(work(unit))] = unit
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda t: place[running[t]]):
                unit = running.pop(task)
                task.result()
                for u in after[unit]:
                    missing[u] -= 1
                    if not missing[u]:
                        heapq.heappush(ready, (-priority[u], place[u], u))
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
