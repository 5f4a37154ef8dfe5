"""The draft's side of mirrored speculation: a worker of its own that drafts while the target is still computing.

Two kinds of messages reach it. Early: for every row of the target's window the kappa likeliest next tokens as a middle
layer sees them. It then grows a *hypothesis* under every one of them: "the target accepts r tokens of the window, then
says v". Verdict: how many tokens were accepted, and the token behind them. The hypothesis that came true becomes the
next window, as far as it has grown; where none did, a fresh chain is drafted. The worker keeps K/V of the text and of
every hypothesis by reference: a branch costs its own rows, never a copy of the prefix. (arXiv 2510.13161, section 3.)
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stretto.engine.cache import View
from stretto.engine.runner import Runner
from stretto.models.batch import FlatBatch

__all__ = ["CLOSE", "EARLY", "OPEN", "VERDICT", "Stats", "Window", "Worker"]

OPEN, EARLY, VERDICT, CLOSE = "open", "early", "verdict", "close"
CHUNK = 256  # rows of one forward over text that was not read yet
ROWS = 192  # most rows of one forward over hypotheses


@dataclass(slots=True)
class Stats:
    """What the two workers told each other, and what came of it. ``bytes``: by kind of message."""

    bytes: dict[str, int] = field(default_factory=lambda: {EARLY: 0, VERDICT: 0})
    steps: int = 0  # verdicts on steps that had a window or early candidates
    reused: int = 0  # of those: the hypothesis that came true was there
    covered: int = 0  # of those: the correction was among the early candidates of its row
    ready: int = 0  # tokens below the hypothesis when its verdict came
    late: int = 0  # windows that came after their time-out
    trace: list[tuple[str, str, float, float]] | None = None  # (worker, what, start, end)

    def mark(self, worker: str, what: str, start: float) -> None:
        if self.trace is not None:
            self.trace.append((worker, what, start, time.perf_counter()))


@dataclass(slots=True)
class Window:
    """What the worker has ready for one sequence: ``tokens`` to verify in step ``step``."""

    step: int = -1
    tokens: list[int] = field(default_factory=list)


class _Hypotheses:
    """The draft's view of one sequence: the text, and a tree of what may follow. Node 0 is the last token of the text.

    ``slot[i]``: where the K/V of node i is, -1 = not evaluated; ``next[i]``: the draft's own token behind it.
    """

    def __init__(self, runner: Runner, text: list[int]):
        self.alloc, self.view, self.text = runner.alloc, View(runner.alloc), text
        self.step = 0
        self.window: list[int] = []
        self.early: list[list[int]] = []  # candidates behind each prefix of the window in the step under way
        self.plant(-1)

    def plant(self, slot: int) -> None:
        """Only the root is left; ``slot`` is its own, if it was evaluated."""
        self.tokens, self.parent, self.slot = [self.text[-1]], [-1], [slot]
        self.next: list[int] = [-1]
        self.child: dict[tuple[int, int], int] = {}
        self.room: list[int] = [0]  # levels that may still grow below each node

    def add(self, parent: int, token: int, room: int) -> int:
        node = self.child.get((parent, token))
        if node is None:
            node = self.child[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parent.append(parent)
            self.slot.append(-1)
            self.next.append(-1)
            self.room.append(room)
        self.room[node] = max(self.room[node], room)
        return node

    def path(self, node: int) -> list[int]:
        """Nodes from the root down to ``node``."""
        out = []
        while node >= 0:
            out.append(node)
            node = self.parent[node]
        return out[::-1]

    def below(self, node: int) -> list[int]:
        """The draft's own chain behind ``node``, as far as it has grown."""
        out = []
        while self.next[node] >= 0:
            token = self.next[node]
            out.append(token)
            node = self.child.get((node, token), -1)
            if node < 0:
                break
        return out

    def clear(self, keep: Seq[int] = ()) -> None:
        """Free the rows of all nodes but ``keep``."""
        kept = set(keep)
        slots = [s for i, s in enumerate(self.slot) if s >= 0 and i not in kept]
        self.alloc.release(np.array(slots, np.int32))

    def close(self) -> None:
        self.clear()
        self.view.release()


class Worker:
    """``gamma``: tokens of a window. ``post`` is called by the target's side, ``take`` waits for a window.

    The thread holds no reference to the method; ``stop`` ends it. A failure ends drafting, never the target:
    ``failure`` says what it was.
    """

    def __init__(self, runner: Runner, gamma: int, *, core: int | None = None, trace: bool = False):
        self.runner, self.gamma, self.core = runner, gamma, core
        self.stats = Stats(trace=[] if trace else None)
        self.failure: str | None = None
        self._inbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._held: list[tuple[Any, ...]] = []
        self._live: dict[int, _Hypotheses] = {}
        self._windows: dict[int, Window] = {}
        self._ready = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="stretto-mirror", daemon=True)
        self._thread.start()

    def post(self, *message: Any, wake: bool = True) -> None:
        """Hand over a message without waiting; with ``wake`` false it may lie until the next one."""
        self._held.append(message)
        if wake:
            held, self._held = self._held, []
            for one in held:
                self._inbox.put(one)

    def take(self, number: int, step: int, timeout: float) -> list[int]:
        """The window of sequence ``number`` for ``step``; empty when it does not come within ``timeout`` seconds."""
        end = time.perf_counter() + timeout
        with self._ready:
            while self.failure is None:
                window = self._windows.get(number)
                if window is not None and window.step == step:
                    return window.tokens
                left = end - time.perf_counter()
                if left <= 0 or not self._ready.wait(left):
                    self.stats.late += 1
                    return []
        return []

    def stop(self) -> None:
        self._inbox.put(None)

    def join(self, timeout: float = 5.0) -> None:
        self._thread.join(timeout)

    # ---- the worker's own thread ----

    def _run(self) -> None:
        try:
            self._pin()
            while True:
                if not self._drain(wait=not self._growing()):
                    return
                if growing := self._fit(self._growing()):
                    self._grow(growing)
        except BaseException as e:
            self.failure = f"{type(e).__name__}: {e}"
            with self._ready:
                self._ready.notify_all()

    def _pin(self) -> None:
        import os

        if self.core is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(threading.get_native_id(), {self.core})

    def _drain(self, wait: bool) -> bool:
        """Handle what lies in the inbox, waiting for a first message if there is nothing else to do."""
        while True:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if message is None:
                return False
            wait = False
            kind, number, *rest = message
            if kind == OPEN:
                self._live[number] = _Hypotheses(self.runner, list(rest[0]))
            elif number in self._live:
                getattr(self, f"_on_{kind}")(number, self._live[number], *rest)

    def _on_early(self, number: int, h: _Hypotheses, step: int, ids: np.ndarray, logp: np.ndarray) -> None:
        """``ids`` int32 [w + 1, kappa]: candidates behind each prefix of the window."""
        self.stats.bytes[EARLY] += ids.size * (4 + 2)
        if step != h.step:
            return
        h.early, node = ids.tolist(), 0
        for r, row in enumerate(h.early):
            follow = h.window[r] if r < len(ids) - 1 else -1
            for token in row:
                if token != follow:
                    h.add(node, token, self.gamma)
            if follow >= 0:
                node = h.add(node, follow, 0)

    def _on_verdict(self, number: int, h: _Hypotheses, step: int, accepted: int, token: int, more: bool) -> None:
        self.stats.bytes[VERDICT] += 8
        path, covered = [0], True
        for t in [*h.window[:accepted], token]:
            node = h.child.get((path[-1], t), -1)
            if node < 0:
                covered = False
                break
            path.append(node)
        if h.early:
            self.stats.steps += 1
            self.stats.reused += covered
            self.stats.covered += token in h.early[accepted]
            self.stats.ready += len(h.below(path[-1])) if covered else 0
        self._advance(h, path, [*h.window[:accepted], token], covered)
        h.step, h.window, h.early = step + 1, [], []
        if more:
            self._extend(h)
            self._publish(number, h)

    def _extend(self, h: _Hypotheses) -> None:
        """Let the chain behind the root grow to a whole window."""
        node, left = 0, self.gamma
        while True:
            h.room[node] = left
            if h.next[node] < 0 or left == 1:
                return
            left -= 1
            node = h.add(node, h.next[node], left)

    def _advance(self, h: _Hypotheses, path: list[int], tokens: list[int], covered: bool) -> None:
        """The text grows by ``tokens``; what was evaluated along ``path`` stays, and the tree below its end if that is
        the whole path."""
        done = []
        for node in path[:-1] if covered else path:
            if h.slot[node] < 0 or len(h.view) != len(h.text) - 1:
                break
            done.append(node)
        root = path[-1] if covered else -1
        chain = self._chain(h, root) if covered else []
        h.clear([*done, *chain])
        h.view.append(np.array([h.slot[n] for n in done], np.int32))
        h.text += tokens
        whole = len(h.view) == len(h.text) - 1
        kept = [(h.tokens[n], h.slot[n], h.next[n]) for n in chain]
        if not whole:
            h.alloc.release(np.array([s for _, s, _ in kept if s >= 0], np.int32))
            kept = []
        h.plant(kept[0][1] if kept else -1)
        if kept:
            h.next[0], node = kept[0][2], 0
            for token, slot, follow in kept[1:]:
                node = h.add(node, token, 0)
                h.slot[node], h.next[node] = slot, follow

    def _chain(self, h: _Hypotheses, node: int) -> list[int]:
        """``node`` and the nodes of the draft's own chain behind it."""
        out = [node]
        while (node := h.child.get((node, h.next[node]), -1)) >= 0:
            out.append(node)
        return out

    def _on_close(self, number: int, h: _Hypotheses) -> None:
        del self._live[number]
        with self._ready:
            self._windows.pop(number, None)
        h.close()

    def _publish(self, number: int, h: _Hypotheses) -> None:
        """Make the window known when it is long enough."""
        tokens = h.below(0)[: self.gamma]
        if len(tokens) == self.gamma:
            h.window, h.room = tokens, [0] * len(h.room)
            with self._ready:
                self._windows[number] = Window(h.step, tokens)
                self._ready.notify_all()

    def _growing(self) -> list[tuple[int, _Hypotheses, list[int]]]:
        """(number, sequence, nodes to evaluate next): leaves with room, and what is missing above them."""
        out = []
        for number, h in self._live.items():
            nodes: list[int] = []
            for node in range(len(h.tokens)):
                if h.room[node] > 0 and h.next[node] < 0:
                    nodes += [n for n in h.path(node) if h.slot[n] < 0 and n not in nodes]
            if nodes:
                out.append((number, h, sorted(nodes)[:ROWS]))
        return out

    def _fit(self, growing: list[tuple[int, _Hypotheses, list[int]]]) -> list[tuple[int, _Hypotheses, list[int]]]:
        """What has room in the draft's cache. Where it runs out, all hypotheses go, then the texts of idle sequences,
        then sequences are left without a window."""
        need = [len(h.text) - 1 - len(h.view) + len(nodes) for _, h, nodes in growing]
        if sum(need) <= self.runner.alloc.free:
            return growing
        waiting = {number for number, h, _ in growing if h.room[0]}
        for number, h in self._live.items():
            h.clear()
            h.plant(-1)
            if number not in waiting:
                h.view.truncate(0)
        out = []
        for number, h, _ in growing:
            if number not in waiting:
                continue
            if len(h.text) - len(h.view) + self.gamma <= self.runner.alloc.free:
                h.room[0] = self.gamma
                return [(number, h, [0])]
            with self._ready:
                self._windows[number] = Window(h.step, [])
                self._ready.notify_all()
        return out

    def _grow(self, growing: list[tuple[int, _Hypotheses, list[int]]]) -> None:
        """One forward of the draft over the next rows of all sequences; every evaluated node gets its successor."""
        start = time.perf_counter()
        for _, h, _ in growing:
            while (unread := len(h.text) - 1 - len(h.view)) > 0:
                n, at = min(unread, CHUNK), len(h.view)
                slots = self.runner.alloc.alloc(n)
                self.runner.forward(_chain_batch(h.text[at : at + n], at, slots, h.view.slots))
                h.view.append(slots)
        batch, places = self._batch(growing)
        best = torch.argmax(self.runner.forward(batch).logits, -1).tolist()
        for (h, node), slot, token in zip(places, batch.slots.tolist(), best, strict=True):
            h.slot[node], h.next[node] = slot, token
            if h.room[node] > 1:
                h.add(node, token, h.room[node] - 1)
        for number, h, _ in growing:
            if h.room[0]:
                self._publish(number, h)
        self.stats.mark("draft", f"{batch.n} rows", start)

    def _batch(self, growing: list[tuple[int, _Hypotheses, list[int]]]) -> tuple[FlatBatch, list]:
        """Every node sees the text, its evaluated ancestors, and those of this forward."""
        places = [(h, node) for _, h, nodes in growing for node in nodes]
        row = {(id(h), node): i for i, (h, node) in enumerate(places)}
        contexts, local, counts, positions = [], [], [], []
        for h, node in places:
            path = h.path(node)
            here = [row[id(h), n] for n in path if (id(h), n) in row]
            before = [h.slot[n] for n in path if (id(h), n) not in row]
            contexts.append(np.concatenate([h.view.slots, np.array(before, np.int32)]))
            local += here
            counts.append(len(here))
            positions.append(len(h.text) - 1 + len(path) - 1)
        n = len(places)
        numbers = np.arange(n, dtype=np.int32)
        return FlatBatch(
            np.array([h.tokens[node] for h, node in places], np.int64), np.array(positions, np.int32),
            self.runner.alloc.alloc(n), numbers, np.concatenate(contexts), _ptr([len(c) for c in contexts]),
            np.array(local, np.int32), _ptr(counts), numbers,
        ), places


def _chain_batch(tokens: list[int], at: int, slots: np.ndarray, context: np.ndarray) -> FlatBatch:
    """Consecutive rows of the text; no logits."""
    n = len(tokens)
    return FlatBatch(
        np.array(tokens, np.int64), np.arange(at, at + n, dtype=np.int32), slots, np.zeros(n, np.int32), context,
        np.array([0, len(context)], np.int32), np.tril_indices(n)[1].astype(np.int32), _ptr(range(1, n + 1)),
        np.array([n - 1], np.int32),
    )


def _ptr(counts: Seq[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
