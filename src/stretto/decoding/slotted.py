"""Drafting by slots at run time: what ppd and hidden_transfer share.

A step's rows are the nodes of a draft tree, then the slots of those nodes, first slots first. Everything that depends
on the tree alone is made once (``Rows``), so that a step costs a dictionary look-up, two lists of tokens and a top-k.

The trees come from ``slots.best_plan`` on the measured curve, for the number of sequences at hand; what kind of text is
before us is read from how sure the laws are (classes of their largest probability). Whether slots pay at all
is the shared planner's decision, from the drafts that were accepted per step.
"""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stretto.decoding.planner import RESTED, Pace, Planner, rested
from stretto.decoding.slots import Kind, Plan, Price, SlotTree, best_plan, best_tree, fixed_plan, group_mask
from stretto.decoding.tree import best_first
from stretto.decoding.verify import accept_tree, choose
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step, Visible

__all__ = ["Laws", "Rows", "Slotted", "Statistics"]

KINDS = 20  # kinds of text that a plan tells apart, at most; the rest are rare
NODES, ROWS = 16, 48  # candidates and rows of a step, at most
RANKS = 6  # candidates of a law that may enter a tree
REPLAN = (40, 400)  # steps after which the time beside the forward is known better
GUESS = 1e-4  # seconds of a step beside its forward, until it is known
UNMEASURED = [1 + n / 16 for n in range(ROWS + 1)]  # a curve for engines that do not plan
FEWEST = 4  # rows below which no slot is tried
PATIENCE = 4  # steps of a probe: the first only plants slots


class Laws:
    """What the last accepted node's slots said. ``best[d]``: the likeliest token of law d + 1; ``key``: how sure each
    law is; ``law(d)``: logits [V], for the further ranks when a tree asks for them."""

    __slots__ = ("_law", "_top", "best", "key")

    def __init__(
        self, best: Seq[int] = (), key: tuple[int, ...] = (), law: Callable[[int], Tensor] | None = None
    ):
        self.best, self.key, self._law = best, key, law
        self._top: dict[int, list[int]] = {}

    def token(self, depth: int, rank: int) -> int:
        """Candidate ``rank`` at ``depth``, both from 0."""
        if not rank:
            return self.best[depth]
        if depth not in self._top:
            assert self._law is not None  # whoever has a best token has a law
            law = self._law(depth).cpu().numpy()
            top = np.argpartition(law, -RANKS)[-RANKS:]
            top = top[np.argsort(-law[top], kind="stable")].tolist()
            first = self.best[depth]
            self._top[depth] = [first, *[t for t in top if t != first]]
        return self._top[depth][rank]


NONE = Laws()


class Statistics:
    """Chances of candidates, from an adapter's statistics (``training.slot_rows.statistics``).

    ``acc(key)``: acc[d][r] for laws of these classes. A random adapter without statistics gets a modest guess.
    """

    def __init__(self, found: Mapping[str, Any], k: int):
        self.borders = [float(x) for x in found.get("classes", ())]
        classes = len(self.borders) + 1
        hits = np.asarray(found.get("hits", np.zeros((k, classes, RANKS))), float)[:k, :, :RANKS]
        tries = np.asarray(found.get("tries", np.zeros((k, classes))), float)[:k, :, None]
        guess = np.array([0.3 / 2**r for r in range(hits.shape[2])])
        overall = (hits.sum(1, keepdims=True) + 4 * guess) / (tries.sum(1, keepdims=True) + 4)
        self._acc = np.minimum.accumulate((hits + 4 * overall) / (tries + 4), axis=2).tolist()
        self.mean = np.minimum.accumulate(overall[:, 0], axis=1).tolist()
        seen = sorted(found.get("seen", {}).items(), key=lambda item: -item[1])[:KINDS]
        self.kinds: list[Kind] = [(n, self.acc(tuple(map(int, key[:k])))) for key, n in seen] or [(1.0, self.mean)]

    def acc(self, key: tuple[int, ...]) -> list[list[float]]:
        return [self._acc[d][c] for d, c in enumerate(key)]


class Rows:
    """A tree as the rows of a step. ``slot_rows[v]``: rows of node v's slots [slots of v * members]."""

    def __init__(self, tree: SlotTree, members: int, mask: np.ndarray, fill: Fill):
        nodes = tree.nodes
        self.tree, self.parent, self.nodes = tree, [-1, *tree.parent], nodes
        self.pick = [(d - 1, r) for d, r in zip(tree.depth, tree.rank, strict=True)]
        depth, at, index, source, member = [0, *tree.depth], [], [], [], []
        self.slot_rows: list[list[int]] = [[] for _ in range(nodes)]
        for i in range(max(tree.slots)):
            for v in (v for v, n in enumerate(tree.slots) if n > i):
                for j in range(members):
                    self.slot_rows[v].append(nodes + len(index))
                    index.append(i)
                    source.append(v)
                    member.append(j)
                    at.append(depth[v] + i + 1)
        self.n, self.blank = nodes + len(index), [0] * len(index)
        self.offsets = np.array(depth + at, np.int32)
        see = np.zeros((self.n, self.n), bool)
        for v, p in enumerate(self.parent):
            see[v] = see[p] if p >= 0 else False
            see[v, v] = True
        for a, (v, i, j) in enumerate(zip(source, index, member, strict=True)):
            see[nodes + a, :nodes] = see[v, :nodes]
            for b, (w, x, y) in enumerate(zip(source, index, member, strict=True)):
                see[nodes + a, nodes + b] = v == w and mask[i, j, x, y]
        self.see = Visible(see)
        self.extra = fill(np.array(index), np.array(member), np.array(source), nodes) if index else {}


Fill = Callable[[np.ndarray, np.ndarray, np.ndarray, int], dict[str, Any]]


@dataclass(slots=True)
class State:
    """What a sequence carries from step to step."""

    pace: Pace
    laws: Laws = NONE


@dataclass(slots=True)
class _Ready:
    """A plan and the rows of its trees, by the laws' key."""

    plan: Plan
    width: int  # rows of a step beyond the first, in the long run
    price: Any = None
    rows: dict[tuple[int, ...], Rows | None] = field(default_factory=dict)


class Slotted:
    """``fill(slot, member, node, first)`` gives the fields of the Step that make the slots' rows, which begin at row
    ``first``: slot numbers from 0, members and nodes as arrays. ``slot_rows[i]``: what slot i + 1 costs in rows.
    ``budget``: rows of the paper's plan, 0 = as many as pay."""

    def __init__(
        self, host: Host, *, k: int, statistics: Mapping[str, Any], fill: Fill, slot_rows: Seq[float], budget: int,
        members: int = 1, mask: str = "ensemble",
    ):
        self._host, self._fill, self._k, self._members, self._budget = host, fill, k, members, budget
        self.statistics = Statistics(statistics, k)
        self._mask, self._cost = group_mask(k, members, mask), [members * c for c in slot_rows]
        self._ready: dict[tuple[int, int, int], _Ready] = {}
        self._fixed = fixed_plan([row[:RANKS] for row in self.statistics.mean], budget) if budget else None
        self._steps, self._making = 0, 0.0  # _making: seconds that went into plans and rows, once for many steps
        self.planner = Planner(host, [0.0], probe=1, patience=PATIENCE)
        start = self._find(1, 128, ROWS).plan.tokens - 1
        self.planner.shared.rate[0] = start

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        paces = [seq.state.pace for seq in seqs]
        if (resting := self.planner.rest(seqs, paces)) is not None:
            return resting
        start, n, self._making = self.planner.begin(), len(seqs), 0.0
        self._steps += 1
        if self._steps in REPLAN and not self._budget:
            self._ready.clear()
        ready = self._find(n, sum(len(s.tokens) for s in seqs) // n, min(s.row_limit for s in seqs))
        if not ready.width:
            for seq in seqs:
                if not seq.generated:
                    seq.metrics.note(f"no slots: by the measured curve no tree pays at batch {n}")
            return [Step([seq.tokens[-1]], extra=RESTED) for seq in seqs]
        offers = [self._offer(seq, ready) for seq in seqs]
        counts = self.planner.allot(seqs, paces, offers, width=ready.width)
        steps = [self._step(seq, ready) if c else Step([seq.tokens[-1]]) for seq, c in zip(seqs, counts, strict=True)]
        self.planner.pause(start + self._making)
        self.planner.once(self._making)
        return steps

    def steps(self, seqs: list[Sequence]) -> list[Step]:
        """Steps with slots for all of them, whether or not they pay."""
        ready = self._find(len(seqs), max(len(s.tokens) for s in seqs), ROWS)
        return [self._step(seq, ready) if ready.width else Step([seq.tokens[-1]]) for seq in seqs]

    def commit(self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]) -> list[Commit]:
        if (commits := rested(seqs, steps, outcomes)) is not None:
            for seq in seqs:
                seq.state.laws = NONE
            return commits
        start = time.perf_counter()
        commits = [self.verified(*item) for item in zip(seqs, steps, outcomes, strict=True)]
        self.planner.end(start, len(seqs), sum(len(s.tokens) - 1 for s in steps))
        return commits

    def _offer(self, seq: Sequence, ready: _Ready) -> list[float]:
        pace, reach = seq.state.pace, len(seq.tokens) + 2 * self._k
        if not ready.width or seq.remaining < 3 or reach > self._host.config.max_position_embeddings:
            return []
        return [] if self.planner.asleep(seq, pace) else [pace.rates.rate[0]]

    def _step(self, seq: Sequence, ready: _Ready) -> Step:
        laws = seq.state.laws
        rows = ready.rows.get(laws.key)
        if rows is None:
            start = time.perf_counter()
            rows = ready.rows[laws.key] = self._rows(ready, laws.key)
            self._making += time.perf_counter() - start
        tokens = [seq.tokens[-1], *[laws.token(d, r) for d, r in rows.pick], *rows.blank]
        at, sure = rows.offsets + np.int32(seq.computed), self._members == 1
        return Step(tokens, at, rows.see, extra=rows, sure=sure, **rows.extra)

    def _rows(self, ready: _Ready, key: tuple[int, ...]) -> Rows:
        if self._fixed is not None:
            tree = self._fixed.trees[len(key)][0]
        else:
            shape = best_first(self.statistics.acc(key), NODES)
            tree = best_tree(shape, ready.plan.worth, ready.plan.rate, ready.price, ROWS)
        return Rows(tree, self._members, self._mask, self._fill)

    def verified(self, seq: Sequence, step: Step, outcome: Outcome) -> Commit:
        """What one step commits; the laws of its last node become the sequence's."""
        state, rows = seq.state, step.extra
        if rows is None:
            state.laws = NONE
            return Commit([choose(seq, outcome, 0)], keep=(0,), logprob_rows=(0,))
        if rows.nodes > 1:
            commit = accept_tree(seq, step.tokens[: rows.nodes], rows.parent, outcome)
        else:
            commit = Commit([choose(seq, outcome, 0)], keep=(0,), logprob_rows=(0,))
        at = rows.slot_rows[commit.keep[-1]]
        state.laws = self._laws(outcome, at) if at else NONE
        self.planner.learn(state.pace, 0, commit.accepted)
        self.planner.probed(state.pace, commit.accepted)
        return commit

    def _laws(self, outcome: Outcome, at: Seq[int]) -> Laws:
        """The laws of the slots in rows ``at``. The logits stay the forward's: further ranks may never be asked for."""
        borders = self.statistics.borders
        if self._members > 1:
            means = outcome.logits[at].view(-1, self._members, outcome.logits.shape[-1]).mean(1)
            sure, best = (x.tolist() for x in torch.softmax(means, -1).max(-1))
        else:
            means, best, sure = None, outcome.argmax[at].tolist(), outcome.sure[at].tolist()

        def law(depth: int) -> Tensor:
            return outcome.logits[at[depth]] if means is None else means[depth]

        key = tuple([bisect(borders, p) for p in sure]) if borders else (0,) * len(best)
        return Laws(best, key, law)

    def _find(self, batch: int, context: int, limit: int) -> _Ready:
        """The plan for this many sequences and about this much context."""
        batch = 1 << (batch - 1).bit_length()
        limit = min(ROWS, 1 << (limit.bit_length() - 1))
        bucket = max(8, context.bit_length())
        key = (batch, bucket, limit)
        ready = self._ready.get(key)
        if ready is None:
            start = time.perf_counter()
            ready = self._ready[key] = self._make(batch, 1 << bucket, limit)
            self._making += time.perf_counter() - start
        return ready

    def _make(self, batch: int, context: int, limit: int) -> _Ready:
        if limit < FEWEST:
            return _Ready(best_plan(self.statistics.kinds, [1.0, 1.0, 9.0]), 0)
        if self._fixed is not None:
            fits = self._fixed.rows <= limit
            return _Ready(self._fixed, round(self._fixed.rows) - 1 if fits else 0)
        seconds, fixed = UNMEASURED, 0.0
        if self.planner.target is not None:
            table = self.planner.target.table(context, batch * ROWS)
            seconds = [table[batch * n] / batch for n in range(ROWS + 1)]
            fixed = (self.planner.overhead or GUESS) / batch
        plan = best_plan(
            self.statistics.kinds, seconds, slot_rows=self._cost, fixed=fixed, nodes=NODES, rows=limit
        )
        return _Ready(plan, max(0, round(plan.rows) - 1), Price(seconds, fixed, self._cost))
