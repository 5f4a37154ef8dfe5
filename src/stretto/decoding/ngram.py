"""Prompt lookup: what followed the last words before is proposed again.

The last n tokens (n from ``max_ngram`` down to ``min_ngram``) are looked up among the earlier tokens of the same
sequence, prompt and output, and the tokens that followed their latest occurrence are the draft.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from stretto.decoding.ar import require_causal
from stretto.decoding.costs import Rates
from stretto.decoding.options import option
from stretto.decoding.planner import Pace, Planner, rested, room
from stretto.decoding.tree import Tree
from stretto.decoding.verify import accept_chain, accept_tree
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.errors import OptionError

__all__ = ["Ngram", "Options"]

LONGEST = 16  # tokens of a match that are compared; longer ones count the same
MATCH = [min(n.bit_length(), 5) for n in range(LONGEST + 1)]  # class of a match: 1, 2-3, 4-7, 8-15, 16 tokens
DEPTH = [min((d + 1).bit_length(), 5) - 1 for d in range(64)]  # class of a depth: 1, 2-3, 4-7, 8-15, 16 and deeper
KEYS = [[5 * (m - 1) + d for d in DEPTH] for m in range(1, 6)]  # [class of match - 1][depth from 0]
NOTHING = ((), (), ())
PRIOR = [p for m in (0.4, 0.6, 0.8, 0.9, 0.95) for p in (m, *[0.5 + m / 2] * 4)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Prompt lookup decoding (Saxena, 2023), with vLLM's bounds of n."""

    num_draft_tokens: int = option(12, "most tokens drafted in a step", low=1, high=63)
    max_ngram: int = option(3, "longest n-gram looked up, in tokens", low=1, high=16)
    min_ngram: int = option(1, "shortest n-gram looked up, in tokens", low=1, high=16)
    candidates: int = option(1, "continuations verified in one step, as a tree", low=1, high=8)


@dataclass(slots=True)
class _State:
    """``index``: n-gram -> positions behind its occurrences, latest first; ``done``: tokens that are in it."""

    pace: Pace
    index: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)
    done: int = 0


class Ngram:
    """Copies what followed the same words earlier in the text: pays for extraction, editing and code."""

    name = "ngram"
    lossless = True
    aliases = ("prompt_lookup",)
    kinds = ("causal",)

    def __init__(self, host: Host, options: Options):
        if options.min_ngram > options.max_ngram:
            raise OptionError("ngram.min_ngram", options.min_ngram, f"at most max_ngram ({options.max_ngram})")
        self._host, self._options = host, options
        self._sizes = range(options.min_ngram, options.max_ngram + 1)
        self.planner = Planner(host, PRIOR, steady=False)

    def admit(self, seq: Sequence) -> None:
        require_causal(self._host, self.name)
        seq.state = _State(self.planner.pace())

    def prefill(self, seq: Sequence) -> int:
        return len(seq.tokens) - 1

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        if (resting := self.planner.rest(seqs, [s.state.pace for s in seqs])) is not None:
            return resting
        start = self.planner.begin()
        found = [self._look_up(seq, seq.state) for seq in seqs]
        offers, tag = [offer for offer, _, _ in found], tuple(found[0][2][:1])
        counts = self.planner.allot(seqs, [s.state.pace for s in seqs], offers, tag=tag)
        steps = []
        for i, (_, drafts, keys) in enumerate(found):
            count = counts[i]
            extra = (keys[:count], keys[count:])
            if isinstance(drafts, Tree):
                steps.append(drafts.prefix(1 + count).step(seqs[i], extra))
            else:
                steps.append(Step([seqs[i].tokens[-1], *drafts[:count]], extra=extra))
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
            (keys, beyond), pace = step.extra, seq.state.pace
            drafted += len(keys)
            if isinstance(step.see, str):
                commit = accept_chain(seq, step.tokens, outcome)
                self.planner.judged(pace, keys, commit.accepted, beyond)
            else:
                commit = accept_tree(seq, step.tokens, step.see, outcome)
                self.planner.judged_tree(pace, keys, step.see, commit.keep, beyond)
            commits.append(commit)
        self.planner.end(start, len(seqs), drafted)
        return commits

    def release(self, seq: Sequence) -> None:
        seq.state = None

    def preemptible(self, seq: Sequence) -> bool:
        return True

    def _look_up(self, seq: Sequence, state: _State) -> tuple[Seq[float], Seq[int] | Tree, Seq[int]]:
        """(gains, drafts, keys): nothing when nothing matches."""
        tokens, index = seq.tokens, state.index
        self._extend(state, tokens)
        limit = min(self._options.num_draft_tokens, room(seq))
        if limit:
            for n in reversed(self._sizes):
                found = index.get(tuple(tokens[-n:]))
                if found is not None:
                    rates = state.pace.rates
                    if len(found) == 1:
                        return _chain(tokens, found[0], n, limit, rates)
                    return _branches(tokens, found, n, limit, rates)
        return NOTHING

    def _extend(self, state: _State, tokens: list[int]) -> None:
        """Index every n-gram that something follows."""
        index, keep = state.index, self._options.candidates - 1
        for end in range(max(1, state.done), len(tokens)):
            for n in self._sizes:
                if n <= end:
                    gram = tuple(tokens[end - n : end])
                    index[gram] = (end, *index.get(gram, ())[:keep]) if keep else (end,)
        state.done = len(tokens)


def _match(tokens: list[int], at: int, n: int) -> int:
    """How many tokens before ``at`` equal the last ones, ``n`` of them known to, at most LONGEST."""
    most = min(LONGEST, at)
    while n < most and tokens[at - 1 - n] == tokens[-1 - n]:
        n += 1
    return min(n, LONGEST)


def _copy(tokens: list[int], at: int, limit: int) -> list[int]:
    """``limit`` tokens from ``at`` on; the copy may run into itself, as in Lempel-Ziv."""
    out = tokens[at : at + limit]
    while len(out) < limit:
        out += out[: limit - len(out)]
    return out


def _chain(
    tokens: list[int], at: int, n: int, limit: int, rates: Rates
) -> tuple[list[float], list[int], list[int]]:
    keys = KEYS[MATCH[_match(tokens, at, n)] - 1][:limit]
    return rates.gains(keys), _copy(tokens, at, limit), keys


def _branches(
    tokens: list[int], found: tuple[int, ...], n: int, limit: int, rates: Rates
) -> tuple[list[float], Tree, list[int]]:
    """Several occurrences as one tree, its nodes by falling gain; the latest occurrence wins ties."""
    nodes = []
    for branch, at in enumerate(found):
        gains, chain, keys = _chain(tokens, at, n, limit, rates)
        nodes += [(-g, branch, t, k) for g, t, k in zip(gains, chain, keys, strict=True)]
    nodes.sort(key=lambda node: node[:2])
    tree, ends = Tree.rooted(tokens[-1]), [0] * len(found)
    gains, keys = [], []
    for loss, branch, token, key in nodes:
        ends[branch] = tree.add(ends[branch], token)
        if len(tree) - 1 > len(gains):
            gains.append(-loss)
            keys.append(key)
        if len(gains) == limit:
            break
    return gains, tree, keys
