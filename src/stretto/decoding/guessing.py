"""What drafters with trained parts share: trust in their probabilities, trees grown by it, the verdict on drafts.

A drafter says how probable its guess is. How often guesses of that probability turn out right is learnt live, by
depth and class of the probability, and the product of these rates along a path is what a draft is worth: a calibrated
form of EAGLE-2's cumulative probability (arXiv 2406.16858). Whether and how deep to draft is the planner's choice.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stretto.decoding.costs import Rates, Typical
from stretto.decoding.planner import Planner, rested, room
from stretto.decoding.tree import Tree
from stretto.decoding.verify import accept_chain, accept_tree, choose
from stretto.engine.host import Host
from stretto.engine.runner import Runner
from stretto.engine.types import Commit, Extra, Outcome, Sequence, Step
from stretto.models.adapter import Adapter

__all__ = [
    "SURE", "Growth", "Guide", "Items", "Offer", "best_tokens", "extra_of", "grow", "key_of", "last_states",
    "least_gain",
]

SURE = (0.02, 0.08, 0.2, 0.4, 0.6, 0.8, 0.92, 0.98)  # borders of the classes of probabilities
SHARE = (0.01, 0.05, 0.13, 0.3, 0.5, 0.7, 0.86, 0.95, 0.99)  # what each is worth at first
CLASSES = len(SHARE)


def key_of(depth: int, probability: float) -> int:
    """The key of a guess at ``depth`` (0 = the first draft)."""
    return depth * CLASSES + bisect(SURE, probability)


def extra_of(adapter: Adapter, host: Host, taps: Seq[int], own: Runner | None = None) -> Extra:
    """What a trained part costs; ``own``: the runner of its layers."""
    weight = host.runner.model.dtype.itemsize
    kept = 4 * host.config.hidden_size * len(taps)
    cached = own.pool.nbytes // own.pool.slots if own is not None else 0
    return Extra(
        adapter.parameters, adapter.parameters * weight, kept + cached, adapter.statistics.get("minutes")
    )


@dataclass(slots=True)
class Offer:
    """Drafts for one sequence, best first: every prefix of ``tree`` is one. ``gains``, ``keys`` of the drafts."""

    tree: Tree
    gains: list[float] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)

    @classmethod
    def empty(cls, seq: Sequence) -> Offer:
        return cls(Tree.rooted(seq.tokens[-1]))

    def chain(self, tokens: Seq[int], probabilities: Seq[float], rate: Seq[float], limit: int) -> Offer:
        """A chain of at most ``limit`` drafts; ``rate``: how often guesses of a key are right."""
        gain = 1.0
        for node, token in enumerate(tokens[:limit]):
            self.keys.append(key_of(node, probabilities[node]))
            gain *= rate[self.keys[-1]]
            self.gains.append(gain)
            self.tree.add(node, token)
        return self

    def product(self, levels: Seq[Seq[tuple[int, float]]], rate: Seq[float], limit: int) -> Offer:
        """The best ``limit`` nodes of a tree whose candidates (token, probability) depend on the depth alone."""
        tree = self.tree
        heap: list[tuple[float, int, int, int, float]] = []
        order = 0

        def push(parent: int, depth: int, rank: int, base: float) -> None:
            nonlocal order
            if depth < len(levels) and rank < len(levels[depth]):
                order += 1
                value = base * rate[key_of(depth, levels[depth][rank][1])]
                if rank:  # siblings fall with the rank, whatever the classes say
                    value = min(value, base * rate[key_of(depth, levels[depth][rank - 1][1])])
                heapq.heappush(heap, (-value, order, parent, rank, base))

        push(0, 0, 0, 1.0)
        while heap and len(self.gains) < limit:
            loss, _, parent, rank, base = heapq.heappop(heap)
            depth = tree.depth[parent]
            token, p = levels[depth][rank]
            node = tree.add(parent, token)
            self.gains.append(-loss)
            self.keys.append(key_of(depth, p))
            push(parent, depth, rank + 1, base)
            push(node, depth + 1, 0, -loss)
        return self


class Growth:
    """A tree of guesses that grows level by level; node 0 is the root.

    ``top_p``, ``min_ratio``: of a node's guesses stay the likeliest that together reach ``top_p``, and of those the
    ones that have at least ``min_ratio`` of the first one's probability (Clover's rules; 1 and 0 keep all).
    """

    def __init__(self, seq: Sequence, rate: Seq[float], limit: int, *, top_p: float = 1.0, min_ratio: float = 0.0):
        self.seq, self.limit = seq, limit
        self.token, self.parent, self.depth, self.gain = [seq.tokens[-1]], [-1], [0], [1.0]
        self.key = [-1]
        self.slots: dict[int, Any] = {}  # whatever the drafter keeps of a node
        self.start = 0  # the first row of the text that the drafter sees
        self._rate, self._top_p, self._min_ratio = rate, top_p, min_ratio
        self._newest = 1

    def expand(self, node: int, tokens: Seq[int], probabilities: Seq[float]) -> None:
        """Hang guesses (best first) under ``node``."""
        total, depth, best = 0.0, self.depth[node], 1.0
        for token, p in zip(tokens, probabilities, strict=True):
            if total >= self._top_p or p < self._min_ratio * probabilities[0]:
                break
            total += p
            key = key_of(depth, p)
            best = min(best, self._rate[key])  # siblings fall with the rank, whatever the classes say
            self.token.append(token)
            self.parent.append(node)
            self.depth.append(depth + 1)
            self.gain.append(self.gain[node] * best)
            self.key.append(key)

    def frontier(self, beam: int, least: float) -> list[int]:
        """At most ``beam`` nodes of the newest level that are worth a level more; then a new level begins."""
        new = range(self._newest, len(self.token))
        self._newest = len(self.token)
        if beam == 1 and len(new) == 1:
            return list(new) if self.gain[new[0]] >= least else []
        best = sorted(new, key=lambda i: (-self.gain[i], i))[:beam]
        return [i for i in best if self.gain[i] >= least]

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to ``node``."""
        out = []
        while node > 0:
            out.append(node)
            node = self.parent[node]
        return out[::-1]

    def offer(self) -> Offer:
        """The best ``limit`` nodes; a parent is never worth less than its children, so they are a tree."""
        order = sorted(range(1, len(self.token)), key=lambda i: (-self.gain[i], i))[: self.limit]
        offer, place = Offer(Tree.rooted(self.token[0])), {0: 0}
        for i in order:
            place[i] = offer.tree.add(place[self.parent[i]], self.token[i])
            offer.gains.append(self.gain[i])
            offer.keys.append(self.key[i])
        return offer


Items = list[tuple[Growth, int]]


def grow(
    planner: Planner, growths: list[Growth], state: Tensor, logits: Tensor, *, depth: int, topk: int, beam: int,
    advance: Callable[[int, Items, Tensor], tuple[Tensor, Tensor]], level: Typical,
) -> None:
    """Grow all trees together, one call of ``advance`` a level.

    ``state`` [n, H] and ``logits`` [n, V] belong to the roots. ``advance(d, items, state)`` gives those of the nodes
    ``items`` at depth d from their parents' states. Where the planner is active, a node is expanded only if it
    promises more tokens than plain decoding makes in the time of a ``level``, which is measured here.
    """
    items: Items = [(growth, 0) for growth in growths]
    for d in range(1, depth + 1):
        start = time.perf_counter()
        tokens, sure = best_tokens(logits, topk)
        rows = {}
        for row, (growth, node) in enumerate(items):
            growth.expand(node, tokens[row], sure[row])
            rows[id(growth), node] = row
        if d == depth:
            return
        least = least_gain(planner, level) / len(growths)
        items = [(g, node) for g in growths for node in g.frontier(min(beam, g.limit), least)]
        if not items:
            return
        source = [rows[id(g), g.parent[node]] for g, node in items]
        state, logits = advance(d, items, state if source == list(range(len(state))) else state[source])
        level.learn(time.perf_counter() - start)


def least_gain(planner: Planner, level: Typical) -> float:
    """Tokens that plain decoding makes in the time of a level: a guess worth less is not expanded."""
    one = planner.target.one if planner.active and planner.target is not None else 0.0
    return level.value / one if one else 0.0


def best_tokens(logits: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """The ``k`` best tokens of each row of ``logits`` [n, V], and their probabilities; best first."""
    law = torch.softmax(logits, -1).cpu()
    if k == 1:
        table = law.numpy()  # its argmax is ten times as fast as torch's
        tokens = table.argmax(-1)
        return tokens[:, None].tolist(), table[np.arange(len(table)), tokens][:, None].tolist()
    top, token = torch.topk(law, k)
    return token.tolist(), top.tolist()


def last_states(host: Host, layer: int, seqs: Seq[Sequence]) -> Tensor:
    """float32 [n, H]: the kept states of the last cached row of each sequence."""
    states = host.states(layer)
    if len(seqs) == 1:
        return states[int(seqs[0].view.slots[-1])][None]
    return states[torch.tensor([int(seq.view.slots[-1]) for seq in seqs])]


class Guide:
    """When to draft, how deep, and which of the drafts are verified.

    The planner decides before anything is drafted, from how often drafts of each depth were right lately, so that a
    drafter that does not pay costs nothing. What was drafted is then cut where its probability, calibrated by ``trust``
    (rates by depth and class of the probability), is not worth a row. A depth that was cut counts as a miss.
    """

    def __init__(self, host: Host, statistics: Mapping[str, Any], depth: int, taps: Seq[int]):
        measured = [row[0] for row in statistics.get("acceptance", []) if row]
        known = [measured[min(d, len(measured) - 1)] if measured else 0.6 for d in range(depth)]
        self.depth, self._taps, self._host = depth, tuple(taps), host
        self._waking: set[int] = set()
        self.planner = Planner(host, [min(0.97, max(0.05, k)) for k in known])
        self.trust = Rates([p for _ in range(depth) for p in SHARE], [4.0] * (CLASSES * depth), 256)

    def propose(self, seqs: list[Sequence], draft: Callable[[list[Sequence], int], list[Offer]]) -> list[Step]:
        """``Method.propose``: ``draft(seqs, depth)`` offers drafts for those that it pays for now."""
        waking = bool(self._waking) and any(seq.id in self._waking for seq in seqs)
        if not waking and (resting := self.planner.rest(seqs, [seq.state for seq in seqs])) is not None:
            for seq in seqs:
                seq.taps = self._idle
            return resting
        start, depths = self.planner.begin(), self._depths(seqs)
        steps = [Step([seq.tokens[-1]]) for seq in seqs]
        if able := [i for i, depth in enumerate(depths) if depth]:
            deepest = max(depths)
            for i, offer in zip(able, draft([seqs[i] for i in able], deepest), strict=True):
                steps[i] = self._step(seqs[i], offer, deepest)
        self.planner.pause(start)
        return steps

    def _depths(self, seqs: list[Sequence]) -> list[int]:
        """How deep each sequence drafts now. 0 also while the states of rows before the root are not there yet."""
        offers = [self._offer(seq) for seq in seqs]
        return self.planner.allot(seqs, [seq.state for seq in seqs], offers)

    def _offer(self, seq: Sequence) -> list[float]:
        """What drafts would gain, by depth. While the planner sleeps no states are kept; to wake takes a step more."""
        if seq.id not in self._waking and self.planner.asleep(seq, seq.state):
            seq.taps = self._idle
            return []
        seq.taps = self._awake
        n = min(room(seq), self.depth) if seq.computed == len(seq.view) > 0 else 0
        if n and self._host.written[seq.view.slots[-1]] == 0:
            self._waking.add(seq.id)
            return []
        self._waking.discard(seq.id)
        return seq.state.rates.gains(range(n))

    def admit(self, seq: Sequence) -> None:
        """A sequence that begins while the method sleeps keeps no states of its prompt: it may share any prefix."""
        seq.state = self.planner.pace()
        if self.planner.napping:
            seq.taps = self._idle

    @property
    def _awake(self) -> tuple[int, ...]:
        """The layers whose states are kept while it drafts."""
        also = self._host.taps
        return tuple(sorted({*self._taps, *also})) if also else self._taps

    @property
    def _idle(self) -> tuple[int, ...]:
        """And while it sleeps: none; all where somebody else needs some, as a row has all its states or none."""
        return self._awake if self._host.taps else ()

    def release(self, seq: Sequence) -> None:
        self._waking.discard(seq.id)
        seq.state = None

    def _step(self, seq: Sequence, offer: Offer, depth: int) -> Step:
        """The drafts that are worth a row; ``depth``: how deep was drafted."""
        least = self.planner.row if self.planner.active else 0.0
        count = len(offer.gains)
        while count and offer.gains[count - 1] < least:
            count -= 1
        tree = offer.tree.prefix(1 + count)
        judged = min(depth, max(tree.depth) + 1)
        return tree.step(seq, extra=(offer.keys[:count], judged))

    def commit(self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]) -> list[Commit]:
        """Verify every step against the target, and learn from it."""
        if (plain := rested(seqs, steps, outcomes)) is not None:
            return plain
        start = time.perf_counter()
        commits, planner = [], self.planner
        for seq, step, outcome in zip(seqs, steps, outcomes, strict=True):
            if step.extra is None:
                commits.append(Commit([choose(seq, outcome, 0)], keep=(0,), logprob_rows=(0,)))
                continue
            keys, judged = step.extra
            if isinstance(step.see, str):
                commit = accept_chain(seq, step.tokens, outcome)
                self.trust.learn_chain(keys, commit.accepted)
            else:
                commit = accept_tree(seq, step.tokens, step.see, outcome)
                right = set(commit.keep)
                for node, key in enumerate(keys, 1):
                    if step.see[node] in right:
                        self.trust.learn(key, float(node in right))
            if judged:
                planner.judged(seq.state, range(judged), commit.accepted, range(judged, self.depth))
            commits.append(commit)
        planner.end(start, len(seqs), sum(c.drafted for c in commits))
        return commits
