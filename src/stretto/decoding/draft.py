"""A second, smaller model drafts a chain or a tree; the target verifies it in one forward.

The drafts of all sequences grow together, one forward of the draft model per level. The draft keeps K/V of its own for
each sequence: the rows of accepted drafts stay, and behind them it is a token or two behind the text, which it reads
first in the next step. acceptance="rejection": drafts are drawn from the draft's law and tried by rejection sampling
(Leviathan et al., arXiv 2211.17192; several children without replacement as in Sequoia, arXiv 2402.12374), so the
output follows the target's law. "coupled": drafts use the noise that the target will use at their position, and the
output is plain decoding's with the same seed, token for token. Greedy decoding is the same by both.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from stretto.decoding.ar import require_causal
from stretto.decoding.options import option
from stretto.decoding.planner import Pace, Planner, allot, room
from stretto.decoding.tree import Shape, Tree, best_first
from stretto.decoding.verify import (
    DRAFT,
    accept_chain,
    accept_rejection,
    accept_tree,
    draw_without_replacement,
)
from stretto.engine.cache import View
from stretto.engine.host import Host
from stretto.engine.sampling import noise
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.errors import OptionError
from stretto.models.batch import FlatBatch

__all__ = ["Draft", "Options"]

CHUNK = 512  # rows of one forward of the draft over a text that it has not read yet
REPLAN = 16  # steps between two looks at the shape of a tree
PRIOR = (0.75, 0.12, 0.05, 0.03)  # acceptance of the children of a right node, by rank; 0.02 from there on


@dataclass(frozen=True, kw_only=True)
class Options:
    """Speculative decoding with a draft model."""

    model: str = option("zoo:tiny-draft", "the draft: zoo name, directory or hub id; shares the tokenizer")
    num_draft_tokens: int = option(6, "most tokens drafted in a step: gamma, or the nodes of the tree", low=1, high=63)
    topk: int = option(1, "most children of a node; 1 = a chain", low=1, high=16)
    depth: int = option(0, "levels of the tree (0 = num_draft_tokens for a chain, else 4)", low=0, high=63)
    acceptance: str = option("rejection", "how sampled drafts are tried", choices=("rejection", "coupled"))


@dataclass(slots=True)
class _State:
    """``view``: the text in the draft's cache. ``slots``: tree node -> slot, for nodes evaluated in this step.
    ``laws``: tree node -> the law its children were drawn from."""

    pace: Pace
    view: View
    shape: Shape | None = None
    age: int = 0
    tree: Tree | None = None
    keys: list[int] = field(default_factory=list)
    slots: dict[int, int] = field(default_factory=dict)
    laws: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(slots=True)
class _Rows:
    """Consecutive rows of one path for a forward of the draft; ``slots`` are theirs, ``context`` what is before."""

    tokens: list[int]
    position: int
    slots: np.ndarray
    context: np.ndarray


class Draft:
    """A small model guesses, the large one checks: the general-purpose speed-up at small batch."""

    name = "draft"
    lossless = True
    aliases = ("draft_model", "speculative")
    kinds = ("causal",)

    def __init__(self, host: Host, options: Options):
        self._host, self._options = host, options
        self._depth = _depth(options)
        self._runner = host.open_runner(options.model)
        kind = self._runner.config.attention
        if kind != "causal":
            raise OptionError("draft.model", options.model, f"a model with causal attention, not {kind}")
        ranks = [*PRIOR, *[0.02] * 16][: options.topk]
        self.planner = Planner(host, ranks * self._depth, draft=self._runner)
        self._cap, self._age = self._depth, 0
        self._live: OrderedDict[Sequence, _State] = OrderedDict()  # least recently drafted first
        self._inside = 0.0  # seconds of draft forwards in this propose

    def admit(self, seq: Sequence) -> None:
        require_causal(self._host, self.name)
        seq.state = _State(self.planner.pace(), View(self._runner.alloc))

    def prefill(self, seq: Sequence) -> int:
        return len(seq.tokens) - 1

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        start = self.planner.begin()
        self._inside = 0.0
        for seq in seqs:
            self._forget(seq, seq.state)
        shapes = [self._shape(seq, len(seqs)) for seq in seqs]
        counts = self.planner.allot(
            seqs, [s.state.pace for s in seqs], [s.gain for s in shapes],
            depths=[s.depth for s in shapes], entry=self._entries(seqs),
        )
        chosen = [item for item in zip(seqs, shapes, counts, strict=True) if item[2]]
        self._grow(self._fit(chosen))
        steps = [s.state.tree.step(s) if s.state.tree else Step([s.tokens[-1]]) for s in seqs]
        self.planner.pause(start, self._inside)
        return steps

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        start = time.perf_counter()
        commits = []
        for seq, step, outcome in zip(seqs, steps, outcomes, strict=True):
            state, tree = seq.state, seq.state.tree
            if tree is None:
                commits.append(accept_chain(seq, step.tokens, outcome))
                continue
            if state.laws:
                commit = accept_rejection(seq, tree.tokens, tree.parent, state.laws, outcome)
            else:
                commit = accept_tree(seq, tree.tokens, tree.parent, outcome)
            self.planner.judged_tree(state.pace, state.keys, tree.parent, commit.keep)
            kept = [state.slots.pop(n) for n in commit.keep if n in state.slots]
            state.view.append(np.array(kept, np.int32))
            self._forget(seq, state)
            commits.append(commit)
        self.planner.end(start, len(seqs), sum(c.drafted for c in commits))
        return commits

    def release(self, seq: Sequence) -> None:
        self._forget(seq, seq.state)
        seq.state.view.release()
        self._live.pop(seq, None)
        seq.state = None

    def preemptible(self, seq: Sequence) -> bool:
        return True

    def _forget(self, seq: Sequence, state: _State) -> None:
        """Drop the drafts of the last step; the draft has read at most all tokens but the last."""
        if state.slots:
            self._runner.alloc.release(np.array(list(state.slots.values()), np.int32))
        state.tree, state.keys, state.slots, state.laws = None, [], {}, {}
        if len(state.view) >= len(seq.tokens):
            state.view.truncate(len(seq.tokens) - 1)

    def _shape(self, seq: Sequence, batch: int) -> Shape:
        """What may be drafted now, best first."""
        state, options = seq.state, self._options
        limit = min(options.num_draft_tokens, room(seq))
        positions = self._runner.config.max_position_embeddings
        if len(seq.tokens) + self._depth > positions:
            seq.metrics.note(f"drafting stopped: the draft's context is {positions} tokens")
            limit = 0
        if limit == 0:
            return Shape((), (), (), ())
        if options.topk == 1:
            return best_first([[r] for r in state.pace.rates.rate], limit)
        if self._age % REPLAN == 0 and self.planner.active:
            self._cap = self._best_depth(batch, len(seq.tokens))
        self._age += 1
        if state.shape is None or state.age % REPLAN == 0:
            state.shape = best_first(self._acc(state.pace.rates.rate), options.num_draft_tokens, self._cap)
        state.age += 1
        s = state.shape
        return Shape(s.parent[:limit], s.rank[:limit], s.depth[:limit], s.gain[:limit])

    def _acc(self, rates: Seq[float]) -> list[list[float]]:
        """acc[d][r] from the rates, falling with the rank."""
        k = self._options.topk
        rows = np.asarray(rates).reshape(self._depth, k)
        return np.minimum.accumulate(rows, axis=1).tolist()

    def _best_depth(self, batch: int, context: int) -> int:
        """How many levels are worth their forwards, by the rates of all sequences."""
        acc, best, cap = self._acc(self.planner.shared.rate), 0.0, 1
        nodes = self._options.num_draft_tokens
        target = self.planner.target.table(context, batch * (1 + nodes))
        levels = [self.planner.draft.scale * t for t in self.planner.draft.table(context, batch * nodes)]
        for depth in range(1, self._depth + 1):
            shape = best_first(acc, nodes, depth)
            _, rate = allot([shape.gain] * batch, target, levels=levels, depths=[shape.depth] * batch)
            if rate > best:
                best, cap = rate, depth
        return cap

    def _entries(self, seqs: list[Sequence]) -> list[float] | None:
        """Seconds that the draft needs for the part of each text that it has not read."""
        if not self.planner.active:
            return None
        out = []
        for seq in seqs:
            unread = len(seq.tokens) - len(seq.state.view)
            table = self.planner.draft.table(len(seq.tokens), unread)
            out.append(self.planner.draft.scale * (table[unread] - table[min(2, unread)]))
        return out

    def _fit(self, chosen: list[tuple[Sequence, Shape, int]]) -> list[tuple[Sequence, Shape, int]]:
        """Make room in the draft's pool: idle sequences lose their rows first, then the last ones do not draft."""
        alloc, chosen = self._runner.alloc, list(chosen)
        for seq, _, _ in chosen:
            self._live[seq] = seq.state
            self._live.move_to_end(seq)
        need = [len(s.tokens) - len(s.state.view) + n for s, _, n in chosen]
        drafting = {seq for seq, _, _ in chosen}
        for other in list(self._live):
            if sum(need) <= alloc.free:
                break
            if other not in drafting:
                self._live.pop(other).view.release()
        while sum(need) > alloc.free:
            need.pop()
            seq = chosen.pop()[0]
            seq.state.view.release()
            seq.metrics.note("drafting paused: the draft's cache is full")
        return chosen

    def _grow(self, chosen: list[tuple[Sequence, Shape, int]]) -> None:
        """Draft level by level, all sequences in one forward a level."""
        growths = [_Growth(seq, shape, count) for seq, shape, count in chosen]
        for growth in growths:
            self._catch_up(growth.seq)
        level = [(g, 0) for g in growths]
        while level:
            rows = [self._rows(g, node) for g, node in level]
            logits = self._forward(rows)
            best = torch.argmax(logits, -1).tolist()
            below = []
            for i, (growth, node) in enumerate(level):
                if node == 0:
                    growth.seq.state.view.append(rows[i].slots)
                tokens, law = self._choose(growth, node, logits[i], best[i])
                if law is not None:
                    growth.seq.state.laws[node] = law
                below += [(growth, child) for child in growth.add(node, tokens, self._options.topk)]
            level = below

    def _choose(
        self, growth: _Growth, node: int, logits: Tensor, best: int
    ) -> tuple[list[int], np.ndarray | None]:
        """The children of ``node``, in the order in which they are tried, and the law they were drawn from."""
        sampler, k = growth.seq.sampler, growth.children(node)
        if sampler.plain:
            return [best] if k == 1 else torch.topk(logits, k).indices.tolist(), None
        path = [growth.tree.tokens[n] for n in growth.tree.path(node)]
        index = growth.seq.generated + len(path)
        if sampler.greedy:
            return torch.topk(sampler.process(logits, index, path), k).indices.tolist(), None
        law = sampler.law(logits, index, path).cpu().numpy()
        drawn = self._options.acceptance == "rejection"
        u = noise(sampler.key, index, DRAFT if drawn else 0, len(law))
        return draw_without_replacement(law, u, k), law if drawn else None

    def _rows(self, growth: _Growth, node: int) -> _Rows:
        seq, state = growth.seq, growth.seq.state
        view = state.view
        if node == 0:
            tokens = seq.tokens[len(view) :]
            return _Rows(tokens, len(view), self._runner.alloc.alloc(len(tokens)), view.slots)
        path = growth.tree.path(node)
        above = np.array([state.slots[n] for n in path[:-1]], np.int32)
        slots = self._runner.alloc.alloc(1)
        state.slots[node] = int(slots[0])
        context = np.concatenate([view.slots, above]) if len(above) else view.slots
        return _Rows([growth.tree.tokens[node]], len(seq.tokens) - 1 + len(path), slots, context)

    def _catch_up(self, seq: Sequence) -> None:
        """Read a long unread text in chunks; the last token waits for the first level."""
        view = seq.state.view
        while (unread := len(seq.tokens) - 1 - len(view)) > 32:
            n, at = min(unread, CHUNK), len(view)
            slots = self._runner.alloc.alloc(n)
            self._forward([_Rows(seq.tokens[at : at + n], at, slots, view.slots)])
            view.append(slots)

    def _forward(self, rows: list[_Rows]) -> Tensor:
        """float32 [len(rows), V]: the logits of the last of each."""
        start = time.perf_counter()
        batch = _flat(rows)
        logits = self._runner.forward(batch).logits
        seconds = time.perf_counter() - start
        self._inside += seconds
        if self.planner.draft is not None and batch.n < CHUNK // 2:
            expected = self.planner.draft.table(rows[0].position, batch.n)[batch.n]
            self.planner.draft.observe(seconds, expected)
        return logits


class _Growth:
    """A tree that grows after a static shape; a node whose law has too few tokens has fewer children."""

    def __init__(self, seq: Sequence, shape: Shape, count: int):
        self.seq, self.tree = seq, Tree.rooted(seq.tokens[-1])
        seq.state.tree = self.tree
        self._shape = [0]  # tree node -> node of the shape
        self._below: dict[int, list[tuple[int, int]]] = {}  # node of the shape -> its children (node, rank)
        for i in range(count):
            self._below.setdefault(shape.parent[i], []).append((i + 1, shape.rank[i]))

    def children(self, node: int) -> int:
        return len(self._below[self._shape[node]])

    def add(self, node: int, tokens: list[int], topk: int) -> list[int]:
        """Hang ``tokens`` under ``node``; the new nodes that shall have children."""
        out = []
        for token, (place, rank) in zip(tokens, self._below[self._shape[node]], strict=False):
            child = self.tree.add(node, token)
            self._shape.append(place)
            self.seq.state.keys.append((self.tree.depth[child] - 1) * topk + rank)
            if place in self._below:
                out.append(child)
        return out


def _depth(options: Options) -> int:
    """Levels of the tree; OptionError for sizes that do not go together."""
    nodes, k = options.num_draft_tokens, options.topk
    depth = options.depth or (nodes if k == 1 else min(4, nodes))
    if depth > nodes or (k == 1 and depth != nodes):
        allowed = f"{nodes} for a chain" if k == 1 else f"at most {nodes}"
        raise OptionError("draft.depth", depth, f"{allowed}: num_draft_tokens is {nodes}, topk {k}")
    most = depth if k == 1 else (k ** (depth + 1) - k) // (k - 1)
    if nodes > most:
        raise OptionError(
            "draft.num_draft_tokens", nodes, f"at most {most}, all nodes of {depth} levels with topk {k}"
        )
    return depth


def _flat(rows: list[_Rows]) -> FlatBatch:
    """One FlatBatch; the rows of one item are causal, and each item has its own context."""
    sizes = np.array([len(r.tokens) for r in rows])
    ends = np.cumsum(sizes)
    starts = ends - sizes
    if len(rows) == ends[-1]:
        local = np.arange(len(rows), dtype=np.int32)
        counts = np.ones(len(rows), np.int32)
    else:
        local = np.concatenate([s + np.tril_indices(n)[1] for s, n in zip(starts, sizes, strict=True)])
        counts = np.concatenate([np.arange(1, n + 1) for n in sizes])
    return FlatBatch(
        tokens=np.array([t for r in rows for t in r.tokens], np.int64),
        positions=np.concatenate([np.arange(r.position, r.position + len(r.tokens)) for r in rows]).astype(np.int32),
        slots=np.concatenate([r.slots for r in rows]),
        context_of=np.repeat(np.arange(len(rows), dtype=np.int32), sizes),
        context=np.concatenate([r.context for r in rows]),
        context_ptr=np.cumsum([0, *(len(r.context) for r in rows)], dtype=np.int32),
        local=local.astype(np.int32),
        local_ptr=np.cumsum([0, *counts], dtype=np.int32),
        logit_rows=(ends - 1).astype(np.int32),
    )
