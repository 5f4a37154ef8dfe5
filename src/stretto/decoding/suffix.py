"""Suffix decoding: drafts from a suffix automaton of this text and of earlier outputs of the engine.

An automaton gives the longest suffix of the text that occurred before, and how often each token followed it. Drafts are
grown best first from those frequencies, no longer than ``max_factor`` times the matched length. (SuffixDecoding, arXiv
2411.04975; the automaton is that of Blumer et al., 1985, with occurrence counts.)
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from stretto.decoding.ar import require_causal
from stretto.decoding.options import option
from stretto.decoding.planner import Pace, Planner, rested, room
from stretto.decoding.tree import Tree
from stretto.decoding.verify import accept_chain, accept_tree
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step

__all__ = ["Automaton", "Options", "Suffix"]

SALTS = 16  # tenants whose outputs are kept apart at the same time
SURE = (0.35, 0.55, 0.75, 0.85, 0.93, 0.96)  # prior: how far a frequency is trusted, by the length of the match
CLASSES = (0.4, 0.7, 0.99)  # borders of the classes of frequencies
SHARE = (0.2, 0.55, 0.85, 1.0)  # and their middles
LONGEST = 32  # longer matches count the same
MATCH = [4 * min(max(n, 1).bit_length() - 1, 5) for n in range(LONGEST + 1)]  # match -> first key
PRIOR = [s * p for s in SURE for p in SHARE]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Suffix decoding (Oliaro et al., 2024), with the names of its authors' plug-in."""

    max_depth: int = option(24, "longest draft, in tokens", low=1, high=63)
    max_factor: float = option(2.0, "longest draft in multiples of the matched length", low=0.1, high=64)
    min_probability: float = option(0.1, "least path probability of a drafted token", low=0.0, high=1.0)
    num_draft_tokens: int = option(16, "most tokens drafted in a step", low=1, high=63)
    tree: bool = option(False, "draft a tree where continuations differ, instead of the likeliest chain")
    cache_requests: int = option(500, "earlier outputs that are remembered (0 = none)", low=0, high=100_000)


class Automaton:
    """A suffix automaton that grows by one token at a time, over any number of texts.

    State 0 is the empty string. ``count[s]``: occurrences of the strings of state s; on texts like "aaaa" those of
    short strings are counted low, because only the COUNTED longest suffixes are updated by a token.
    """

    COUNTED = 32

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link, self.length, self.count = [-1], [0], [0]

    def extend(self, last: int, token: int) -> int:
        """Append ``token`` to the text whose state is ``last``; its new state."""
        nxt, link = self.next, self.link
        here = nxt[last].get(token)
        if here is not None:  # another text has this string already
            here = self._whole(last, token, here)
        else:
            here = self._state({}, self.length[last] + 1, 0, 0)
            p = last
            while p >= 0 and token not in nxt[p]:
                nxt[p][token] = here
                p = link[p]
            if p >= 0:
                link[here] = self._whole(p, token, nxt[p][token])
        s, steps = here, self.COUNTED
        while s > 0 and steps:
            self.count[s] += 1
            s, steps = link[s], steps - 1
        return here

    def follow(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """The longest suffix of (matched suffix + token) that occurs: its state and length."""
        nxt, link, length = self.next, self.link, self.length
        while length[link[state]] >= matched and state:
            state = link[state]  # the state was split since
        while state and token not in nxt[state]:
            state = link[state]
            matched = length[state]
        here = nxt[state].get(token)
        return (here, matched + 1) if here is not None else (0, 0)

    def context(self, state: int, matched: int) -> tuple[int, int]:
        """``state``, or behind the end of the text its longest suffix that goes on somewhere."""
        while not self.next[state] and state:
            state = self.link[state]
            matched = self.length[state]
        return state, matched

    def _whole(self, p: int, token: int, q: int) -> int:
        """The state of exactly the longest string of ``p`` followed by ``token``: ``q``, or a copy split off."""
        if self.length[q] == self.length[p] + 1:
            return q
        copy = self._state(dict(self.next[q]), self.length[p] + 1, self.link[q], self.count[q])
        self.link[q] = copy
        while p >= 0 and self.next[p].get(token) == q:
            self.next[p][token] = copy
            p = self.link[p]
        return copy

    def _state(self, nxt: dict[int, int], length: int, link: int, count: int) -> int:
        self.next.append(nxt)
        self.link.append(link)
        self.length.append(length)
        self.count.append(count)
        return len(self.next) - 1


class _Outputs:
    """Finished outputs in two generations: when the younger holds half of the limit, the older is forgotten.

    What is still of use comes back with the outputs that resemble it, so this is LRU at the price of nothing."""

    def __init__(self, requests: int):
        self._half = max(1, requests // 2)
        self._count = self._older = 0
        self.generations = [Automaton()]

    @property
    def remembered(self) -> int:
        """How many outputs can be drafted from."""
        return self._count + self._older

    def add(self, tokens: list[int]) -> None:
        if self._count >= self._half:
            self.generations = [self.generations[-1], Automaton()]
            self._count, self._older = 0, self._count
        young, state = self.generations[-1], 0
        for token in tokens:
            state = young.extend(state, token)
        self._count += 1


@dataclass(slots=True)
class _State:
    """``last``: state of the whole text in its own automaton. ``at``: automaton of earlier outputs, state, match."""

    pace: Pace
    own: Automaton
    last: int
    done: int
    at: list[tuple[Automaton, int, int]]


class Suffix:
    """Copies from this text and from earlier answers: pays for templated, repeated and agentic work."""

    name = "suffix"
    lossless = True
    aliases = ("suffix_decoding",)
    kinds = ("causal",)

    def __init__(self, host: Host, options: Options):
        self._host, self._options = host, options
        self._outputs: OrderedDict[str, _Outputs] = OrderedDict()
        self.planner = Planner(host, PRIOR, steady=False)

    def admit(self, seq: Sequence) -> None:
        require_causal(self._host, self.name)
        seq.state = _State(self.planner.pace(), Automaton(), 0, 0, [])

    def prefill(self, seq: Sequence) -> int:
        return len(seq.tokens) - 1

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        if (resting := self.planner.rest(seqs, [s.state.pace for s in seqs])) is not None:
            return resting
        start = self.planner.begin()
        found = [self._draft(seq, seq.state) for seq in seqs]
        offers = [gains for gains, _, _ in found]
        paces, tag = [s.state.pace for s in seqs], tuple(found[0][2])
        counts = self.planner.allot(seqs, paces, offers, tag=tag)
        steps = [
            tree.prefix(1 + count).step(seq, extra=keys[:count])
            for seq, count, (_, tree, keys) in zip(seqs, counts, found, strict=True)
        ]
        self.planner.pause(start)
        return steps

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        if (commits := rested(seqs, steps, outcomes)) is not None:
            return commits
        start = time.perf_counter()
        commits, drafted = [], 0
        for seq, step, outcome in zip(seqs, steps, outcomes, strict=True):
            drafted += len(step.extra)
            if isinstance(step.see, str):
                commit = accept_chain(seq, step.tokens, outcome)
                self.planner.judged(seq.state.pace, step.extra, commit.accepted)
            else:
                commit = accept_tree(seq, step.tokens, step.see, outcome)
                self.planner.judged_tree(seq.state.pace, step.extra, step.see, commit.keep)
            commits.append(commit)
        self.planner.end(start, len(seqs), drafted)
        return commits

    def release(self, seq: Sequence) -> None:
        limit, output = self._options.cache_requests, seq.tokens[seq.prompt_len :]
        if limit and len(output) > 1:
            self._remembered(seq.salt).add(output)
        seq.state = None

    def preemptible(self, seq: Sequence) -> bool:
        return True

    def _remembered(self, salt: str) -> _Outputs:
        if salt not in self._outputs:
            self._outputs[salt] = _Outputs(self._options.cache_requests)
            if len(self._outputs) > SALTS:
                self._outputs.popitem(last=False)
        self._outputs.move_to_end(salt)
        return self._outputs[salt]

    def _draft(self, seq: Sequence, state: _State) -> tuple[list[float], Tree, list[int]]:
        """(gains, tree, keys) of the best source."""
        root = seq.tokens[-1]
        self._read(seq, state)
        limit = min(self._options.num_draft_tokens, room(seq))
        own = state.own
        link = own.link[state.last]
        best: tuple[list[float], Tree, list[int]] = ([], Tree.rooted(root), [])
        if limit:
            # the first source wins ties
            for automaton, at, matched in [(own, link, own.length[link]), *state.at]:
                if matched > 0:
                    grown = self._grow(automaton, at, matched, root, limit, state.pace.rates.rate)
                    if sum(grown[0]) > sum(best[0]):
                        best = grown
        return best

    def _read(self, seq: Sequence, state: _State) -> None:
        """Bring the own automaton and the places in the shared ones up to the end of the text."""
        new = seq.tokens[state.done :]
        for token in new:
            state.last = state.own.extend(state.last, token)
        state.done = len(seq.tokens)
        outputs = self._outputs.get(seq.salt)
        if outputs is None:
            return
        if not state.at:
            seq.metrics.note(f"drafts come from this text and from {outputs.remembered} earlier outputs")
        places = {id(a): (at, matched) for a, at, matched in state.at}
        state.at = []
        for automaton in outputs.generations:
            at, matched = places.get(id(automaton), (0, 0))
            unread = new if id(automaton) in places else seq.tokens[-self._options.max_depth :]
            for token in unread:
                at, matched = automaton.follow(at, matched, token)
            state.at.append((automaton, at, matched))

    def _grow(
        self, automaton: Automaton, at: int, matched: int, root: int, limit: int, rates: Seq[float]
    ) -> tuple[list[float], Tree, list[int]]:
        """(gains, drafts, keys) from the state ``at``: the likeliest chain, or a tree grown best first."""
        options, tree = self._options, Tree.rooted(root)
        depth = min(options.max_depth, max(1, int(options.max_factor * matched)))
        if not options.tree:
            return self._chain(automaton, at, matched, tree, min(limit, depth), rates)
        gains: list[float] = []
        keys: list[int] = []
        heap = _children(automaton, at, matched, 0, 1.0, rates)
        heapq.heapify(heap)
        while heap and len(keys) < limit:
            loss, token, parent, key, state, length = heapq.heappop(heap)
            if -loss < options.min_probability:
                break
            node = tree.add(parent, token)
            gains.append(-loss)
            keys.append(key)
            if tree.depth[node] < depth:
                for child in _children(automaton, state, length, node, -loss, rates):
                    heapq.heappush(heap, child)
        return gains, tree, keys

    def _chain(
        self, automaton: Automaton, state: int, matched: int, tree: Tree, limit: int, rates: Seq[float]
    ) -> tuple[list[float], Tree, list[int]]:
        gains: list[float] = []
        keys: list[int] = []
        gain, least, count = 1.0, self._options.min_probability, automaton.count
        for node in range(limit):
            state, matched = automaton.context(state, matched)
            nxt = automaton.next[state]
            if not nxt or not matched:
                break
            if len(nxt) == 1:
                ((token, state),) = nxt.items()
                key = 3
            else:
                token, state = max(nxt.items(), key=lambda item: (count[item[1]], -item[0]))
                key = bisect(CLASSES, count[state] / sum([count[s] for s in nxt.values()]))
            key += MATCH[min(matched, LONGEST)]
            gain *= rates[key]
            if gain < least:
                break
            tree.add(node, token)
            gains.append(gain)
            keys.append(key)
            matched += 1
        return gains, tree, keys


def _children(
    automaton: Automaton, state: int, matched: int, parent: int, gain: float, rates: Seq[float]
) -> list[tuple[float, int, int, int, int, int]]:
    """(-path product, token, parent node, key, state, match) of every continuation."""
    state, matched = automaton.context(state, matched)
    nxt, count = automaton.next[state], automaton.count
    if not nxt or not matched:
        return []
    total, out = sum([count[s] for s in nxt.values()]), []
    for token, s in nxt.items():
        share = count[s] / total
        kind = bisect(CLASSES, share)
        key = MATCH[min(matched, LONGEST)] + kind
        scale = min(1.0, share / SHARE[kind])
        out.append((-gain * rates[key] * scale, token, parent, key, s, matched + 1))
    return out
