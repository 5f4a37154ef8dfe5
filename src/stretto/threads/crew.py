"""Many tasks over one engine: whatever each of them wants next is evaluated in the same forwards.

A task is a generator. It yields jobs (thread, method, parameters), which one of ``Session.submit`` takes, and is sent
what they generated; or it yields tasks, which run beside each other, and is sent their results. So a task that forks
reads like a sequential one, and no thread waits for a sibling or for another prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from stretto.account import Generated
from stretto.engine.engine import Progress, Stream
from stretto.engine.params import SamplingParams
from stretto.session import Session, Thread

__all__ = ["Job", "Task", "run_tasks"]

Job = tuple[Thread, Any, SamplingParams]
Task = Generator[Any, Any, Any]  # yields list[Job] -> list[Generated], or list[Task] -> list of results


@dataclass(slots=True, eq=False)
class _Node:
    task: Task
    parent: _Node | None = None
    place: int = 0  # among the parent's children
    results: list[Any] = field(default_factory=list)  # of children
    open: int = 0  # children that still run
    session: Session | None = None
    jobs: list[Job] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)


def run_tasks(
    tasks: Sequence[Task], step: Callable[[], list[Progress]], *, seconds: float | None = None,
) -> list[Any]:
    """Run ``tasks`` beside each other and return their results, in order; ``step`` makes one forward.

    After ``seconds`` what still runs is aborted; the results of such tasks are None. An error of one task aborts all.
    """
    end = None if seconds is None else time.monotonic() + seconds
    root = _Node(task=iter_nothing(), results=[None] * len(tasks), open=len(tasks))
    ready: list[tuple[_Node, Any]] = [(_Node(t, root, i), None) for i, t in enumerate(tasks)]
    running: list[_Node] = []
    try:
        while root.open:
            while ready:
                node, value = ready.pop(0)
                _advance(node, value, ready, running)
            if not running or (end is not None and time.monotonic() > end):
                break
            step()
            for session in {n.session for n in running}:
                session.usage.forwards += 1
            if any(n.streams[-1].finish_reason is not None for n in running):
                done = [n for n in running if all(s.finish_reason is not None for s in n.streams)]
                running = [n for n in running if n not in done]
                ready += [(n, _collected(n)) for n in done]
        return root.results
    finally:
        for node in running:
            assert node.session is not None
            node.session.abandon(node.jobs, node.streams)


def iter_nothing() -> Task:
    return
    yield


def _advance(node: _Node, value: Any, ready: list[tuple[_Node, Any]], running: list[_Node]) -> None:
    """Let a task go on up to what it wants next."""
    try:
        wanted = node.task.send(value)
    except StopIteration as end:
        parent = node.parent
        assert parent is not None
        parent.results[node.place] = end.value
        parent.open -= 1
        if not parent.open and parent.parent is not None:
            ready.append((parent, parent.results))
        return
    if wanted and isinstance(wanted[0], tuple):
        node.jobs, node.session = list(wanted), wanted[0][0].session
        node.streams = node.session.submit(node.jobs, text=False)
        running.append(node)
    elif wanted:
        node.results, node.open = [None] * len(wanted), len(wanted)
        ready += [(_Node(t, node, i), None) for i, t in enumerate(wanted)]
    else:
        ready.append((node, []))


def _collected(node: _Node) -> list[Generated]:
    assert node.session is not None
    return node.session.collect(node.jobs, node.streams)
