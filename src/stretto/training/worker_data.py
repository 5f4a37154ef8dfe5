"""Traces of workers as batches: who sees which rows at which distance, and the loss on what they wrote.

Legend of shapes: n rows of a batch, k learnt tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.models.config import ModelConfig
from stretto.models.segments import Group, SegmentContext
from stretto.training.objectives import Loss, Net
from stretto.training.recipes import Recipe
from stretto.training.worker_traces import OTHERS, OWN, PROMPT, Trace, problems, simulate, unfinished
from stretto.zoo.pages.workers import Problem

__all__ = ["WorkerBatch", "WorkerData", "WorkerLoss", "groups_of", "lay_traces", "worker_data", "worker_probe"]

POOL = 256
WORKERS = ((1, 0.15), (2, 0.25), (3, 0.2), (4, 0.4))
LAYOUTS = (("combined", 0.82), ("interleaved", 0.11), ("contiguous", 0.07))


@dataclass(frozen=True, slots=True)
class WorkerBatch:
    """``tokens``, ``positions``, ``docs`` [1, n]; ``parent``, ``target``, ``weight`` [k]: the row whose law judges a
    token, the token, how much it counts."""

    tokens: Tensor
    positions: Tensor
    docs: Tensor
    moved_by: Tensor  # int64 [n]
    groups: list[Group]
    parent: Tensor
    target: Tensor
    weight: Tensor

    def to(self, device: torch.device | str) -> WorkerBatch:
        move = lambda x: x.to(device) if isinstance(x, Tensor) else x
        groups = [
            Group(g.rows.to(device), [k.to(device) for k in g.keys], [a.to(device) for a in g.at], g.mask.to(device))
            for g in self.groups
        ]
        return WorkerBatch(**{f.name: move(getattr(self, f.name)) for f in fields(self)} | {"groups": groups})

    def context(self, config: ModelConfig) -> SegmentContext:
        return SegmentContext(config, self.groups, self.positions[0], self.moved_by)


@dataclass(frozen=True, slots=True)
class WorkerLoss:
    """Weighted mean cross-entropy of what the workers wrote."""

    config: ModelConfig

    def __call__(self, net: Net, batch: WorkerBatch, generator: torch.Generator) -> Loss:
        hidden = net.hidden(batch.tokens, batch.positions, batch.context(self.config))[0]
        loss_k = F.cross_entropy(net.logits(hidden[batch.parent]), batch.target, reduction="none")
        return Loss((loss_k * batch.weight).sum() / batch.weight.sum(), len(loss_k))


def groups_of(trace: Trace, first: int, total: int) -> list[Group]:
    """Who reads what in one trace whose rows begin at row ``first`` of a batch of ``total`` rows."""
    facts = _Facts(*(np.array([getattr(r, f) for r in trace.rows]) for f in ("line", "block", "at", "time")))
    prompt = np.flatnonzero(facts.line == PROMPT)
    out = [_group(prompt, [_Piece(prompt, facts.at[prompt], prompt <= prompt[:, None])], first, total)]
    headers = {}
    for number in (OTHERS, OWN):
        rows = headers[number] = np.flatnonzero(facts.line == number)
        if len(rows):
            at, everything = facts.at[rows], np.ones((len(rows), len(prompt)), bool)
            before = _Piece(prompt, len(prompt) + at, everything)
            out.append(_group(rows, [before, _Piece(rows, at, rows <= rows[:, None])], first, total))
    for w in range(trace.workers):
        rows = np.flatnonzero(facts.line == w)
        if len(rows):
            out.append(_group(rows, _pieces(trace, w, rows, facts, headers), first, total))
    return out


@dataclass(frozen=True, slots=True)
class _Facts:
    """Of all rows of a trace, as in ``Row``."""

    line: np.ndarray
    block: np.ndarray
    at: np.ndarray
    time: np.ndarray


@dataclass(slots=True)
class _Piece:
    """Keys with one query position a row: ``keys`` where they were written, behind those of ``moved`` where they were
    moved to. ``at`` [r], ``visible`` [r, moved + keys]."""

    keys: np.ndarray
    at: np.ndarray
    visible: np.ndarray
    moved: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


def _pieces(
    trace: Trace, w: int, rows: np.ndarray, facts: _Facts, headers: Mapping[int, np.ndarray]
) -> list[_Piece]:
    """All that worker ``w`` reads, in the order of its layout. A header is a part of the piece behind it."""
    now, history = facts.time[rows], np.array(trace.history)
    common = np.array(trace.common)[now]
    begins = [np.zeros_like(common)]
    found = [_Piece(history[:0], common, np.arange(len(history)) < common[:, None], history)]
    offset, waiting = common.copy(), []

    def piece(keys: np.ndarray, visible: np.ndarray, length: np.ndarray) -> None:
        nonlocal offset, waiting
        before = np.concatenate([history[:0], *waiting])
        offset = offset + len(before)
        seen = np.concatenate([np.ones((len(rows), len(before)), bool), visible], 1)
        begins.append(offset)
        found.append(_Piece(keys, offset, seen, before))
        offset, waiting = offset + length, []

    if trace.layout == "combined":
        waiting.append(headers[OTHERS])
    for other in range(trace.workers) if trace.layout != "interleaved" else ():
        keys = np.flatnonzero(facts.line == other)
        if other == w or not len(keys):
            continue
        here = [trace.here[t][other] for t in now]
        number = np.array([-1 if h is None else h[0] for h in here])
        length = np.array([0 if h is None else h[1] for h in here])
        piece(keys, (facts.block[keys] == number[:, None]) & (facts.at[keys] < length[:, None]), length)
    if trace.layout != "interleaved":
        waiting.append(headers[OWN])
    at, block = facts.at[rows], facts.block[rows]
    piece(rows, (block == block[:, None]) & (at <= at[:, None]), at * 0)
    for p, begin in zip(found, begins, strict=True):
        p.at = offset + at - begin
    return found


def _group(rows: np.ndarray, pieces: Sequence[_Piece], first: int, total: int) -> Group:
    index = lambda x: torch.from_numpy(np.asarray(x, np.int64) + first)
    return Group(
        index(rows), [torch.cat([index(p.moved) + total, index(p.keys)]) for p in pieces],
        [torch.from_numpy(np.asarray(p.at, np.int64)) for p in pieces],
        torch.from_numpy(np.concatenate([p.visible for p in pieces], 1)),
    )


def _moved_by(trace: Trace) -> list[int]:
    """How far each row's key is moved: into the history; a header, in front of the piece behind it."""
    length = {n: sum(r.line == n for r in trace.rows) for n in (OTHERS, OWN)}
    alone = not any(0 < r.line < trace.workers for r in trace.rows)
    back = {OWN: -length[OWN], OTHERS: -length[OTHERS] - (length[OWN] if alone else 0)}
    return [r.moved - r.at if r.moved >= 0 else back.get(r.line, 0) for r in trace.rows]


def lay_traces(traces: Sequence[Trace]) -> WorkerBatch:
    """One batch; the traces do not see each other."""
    rows = [r for t in traces for r in t.rows]
    starts = np.cumsum([0, *(len(t.rows) for t in traces)])
    targets = [(p + int(s), t, w) for trace, s in zip(traces, starts, strict=False) for p, t, w in trace.targets]
    groups = [g for t, s in zip(traces, starts, strict=False) for g in groups_of(t, int(s), len(rows))]
    docs = np.repeat(np.arange(len(traces)), np.diff(starts))
    return WorkerBatch(
        torch.tensor([[r.token for r in rows]]), torch.tensor([[r.at for r in rows]]), torch.from_numpy(docs)[None],
        torch.tensor([d for t in traces for d in _moved_by(t)]), groups,
        torch.tensor([p for p, _, _ in targets]), torch.tensor([t for _, t, _ in targets]),
        torch.tensor([w for _, _, w in targets]),
    )


class WorkerData:
    """An endless, resumable supply of batches of ``rows`` traces. ``pool(k)`` gives the traces of pool number k."""

    def __init__(self, pool: Callable[[int], Sequence[Trace]], *, rows: int):
        self._pool, self.rows = pool, rows
        self.position = (0, 0)

    def __iter__(self) -> Iterator[WorkerBatch]:
        while True:
            k, i = self.position
            traces = self._pool(k)
            while (i + 1) * self.rows <= len(traces):
                self.position = (k, i + 1)
                yield lay_traces(traces[i * self.rows : (i + 1) * self.rows])
                i += 1
            self.position = (k + 1, 0)


def worker_data(recipe: Recipe) -> WorkerData:
    """Traces of the training split."""

    def pool(k: int) -> list[Trace]:
        rng = random.Random(f"{recipe.seed}/workers/{k}")
        found = problems("train", POOL, recipe.seed * 1_000_003 + k, (4, 8))
        return [_trace(p, rng) for p in found]

    return WorkerData(pool, rows=recipe.rows)


def _trace(found: Problem, rng: random.Random) -> Trace:
    workers = _pick(rng, WORKERS)
    if rng.random() < 0.04:
        return unfinished(found, rng, workers)
    check = rng.randint(20, 80) if rng.random() < 0.06 else 0
    return simulate(found, workers, _pick(rng, LAYOUTS), rng, noise=0.03, check_every=check)


def _pick(rng: random.Random, odds: Sequence[tuple[Any, float]]) -> Any:
    return rng.choices([v for v, _ in odds], [o for _, o in odds])[0]


@torch.no_grad()
def worker_probe(net: Any, final: bool) -> dict[str, float]:
    """Shares of right tokens on test problems of eight items: the choices (of an item, of the end) and the rest."""
    found = problems("test", 64 if final else 24, 10_007)
    rng, hits = random.Random(0), {"choice": [], "other": []}
    for i in range(0, len(found), 8):
        traces = [simulate(p, 1 + j % 4, "combined", rng) for j, p in enumerate(found[i : i + 8])]
        batch = lay_traces(traces)
        hidden = net.hidden(batch.tokens, batch.positions, batch.context(net.model.config))[0]
        right = net.logits(hidden[batch.parent]).argmax(-1) == batch.target
        for name, rows in (("choice", batch.weight > 1), ("other", batch.weight == 1)):
            hits[name] += right[rows].tolist()
    return {name: sum(x) / max(1, len(x)) for name, x in hits.items()}
