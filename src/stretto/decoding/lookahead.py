"""Lookahead decoding: a window of Jacobi guesses breeds n-grams, which later steps verify.

Besides the root a step has two branches. The window: N-1 levels of W columns; entry (l, c) stands at position
root + 1 + c + l, and is the answer that column c got l steps ago. The answers to the last level become the newest
level, and each column with its answer is an n-gram for the pool. The candidates: up to G n-grams from the pool that
begin with the root, as a tree. Who sees whom: every row sees the root; a candidate its ancestors; entry (l, c) the
entries (0, 0..c) and (1..l, c). (Fu et al., arXiv 2402.02057; they use N=5, W=15, G=15 on a GPU.)
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from stretto.decoding.ar import require_causal
from stretto.decoding.options import option
from stretto.decoding.planner import Pace, Planner, rested, room
from stretto.decoding.tree import Tree
from stretto.decoding.verify import accept_tree, choose
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step

__all__ = ["Lookahead", "Options", "visibility"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Lookahead decoding (Fu et al., 2024); small defaults, for a forward of at most 16 rows."""

    ngram: int = option(3, "N: length of the n-grams, in tokens; N - 1 levels", low=2, high=8)
    window: int = option(4, "W: columns of the window, in tokens", low=1, high=32)
    candidates: int = option(3, "G: n-grams verified in a step", low=1, high=32)
    pool_from_prompt: bool = option(True, "fill the pool with the n-grams of the prompt first")


@dataclass(slots=True)
class _State:
    """``grid``: levels x columns. ``pool``: first token -> the n-grams behind it, newest last."""

    pace: Pace
    grid: list[list[int]] = field(default_factory=list)
    pool: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    ready: bool = False


@dataclass(frozen=True, slots=True)
class _Layout:
    """Rows of a step: the root and the candidates (``tree``), then ``levels`` x ``columns`` of the window."""

    tree: Tree
    levels: int
    columns: int


class Lookahead:
    """Breeds n-grams by parallel guessing and verifies them: no draft model, no repetition needed."""

    name = "lookahead"
    lossless = True
    kinds = ("causal",)

    def __init__(self, host: Host, options: Options):
        self._host, self._options = host, options
        self._rows = (options.ngram - 1) * (options.window + options.candidates)
        self.planner = Planner(host, [0.5], probe=1, patience=options.ngram + 1)

    def admit(self, seq: Sequence) -> None:
        require_causal(self._host, self.name)
        seq.state = _State(self.planner.pace())

    def prefill(self, seq: Sequence) -> int:
        return len(seq.tokens) - 1

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        if (resting := self.planner.rest(seqs, [s.state.pace for s in seqs])) is not None:
            return resting
        start = self.planner.begin()
        reach = self._options.ngram - 1
        offers = [
            [] if not room(s) or self.planner.asleep(s, s.state.pace)
            else [s.state.pace.rates.rate[0] * reach] for s in seqs
        ]
        counts = self.planner.allot(seqs, [s.state.pace for s in seqs], offers, width=self._rows)
        steps = [self._step(seq) if n else Step([seq.tokens[-1]]) for seq, n in zip(seqs, counts, strict=True)]
        self.planner.pause(start)
        return steps

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        if (commits := rested(seqs, steps, outcomes)) is not None:
            return commits
        start = time.perf_counter()
        commits = [self._commit(*item) for item in zip(seqs, steps, outcomes, strict=True)]
        self.planner.end(start, len(seqs), sum(map(len, steps)) - len(seqs))
        return commits

    def release(self, seq: Sequence) -> None:
        seq.state = None

    def preemptible(self, seq: Sequence) -> bool:
        return True

    def _step(self, seq: Sequence) -> Step:
        state, options, root = seq.state, self._options, seq.computed
        if not state.ready:
            self._begin(seq)
        tree = Tree.rooted(seq.tokens[-1])
        for gram in reversed(state.pool.get(seq.tokens[-1], ())):
            node = 0
            for token in gram[: seq.remaining - 1]:
                if len(tree) < seq.row_limit:
                    node = tree.add(node, token)
        if not state.grid:
            state.grid = [(seq.tokens[-options.window :] * options.window)[: options.window]]
        levels = len(state.grid)
        columns = min(options.window, (seq.row_limit - len(tree)) // levels)
        tokens = tree.tokens + [t for level in state.grid for t in level[:columns]]
        last = self._host.max_model_len - 1  # a guess behind the end has no position of its own
        places = [min(root + 1 + c + l, last) for l in range(levels) for c in range(columns)]
        wanted = [*range(len(tree)), *range(len(tokens) - columns, len(tokens))]
        return Step(
            tokens, [root + d for d in tree.depth] + places, visibility(tree.parent, levels, columns),
            logits=wanted, extra=_Layout(tree, levels, columns),
        )

    def _begin(self, seq: Sequence) -> None:
        state, n = seq.state, self._options.ngram
        state.ready = True
        if self._options.pool_from_prompt:
            prompt = seq.tokens[: seq.prompt_len]
            for i in range(len(prompt) - n + 1):
                self._put(state, tuple(prompt[i : i + n]))

    def _put(self, state: _State, gram: tuple[int, ...]) -> None:
        known = state.pool.setdefault(gram[0], [])
        if gram[1:] in known:
            known.remove(gram[1:])
        known.append(gram[1:])
        del known[: -self._options.candidates]

    def _commit(self, seq: Sequence, step: Step, outcome: Outcome) -> Commit:
        state, layout = seq.state, step.extra
        if layout is None:
            state.grid = []
            return Commit([choose(seq, outcome, 0)], keep=(0,), logprob_rows=(0,))
        tree = layout.tree
        commit = accept_tree(seq, tree.tokens, tree.parent, outcome)
        commit.drafted = len(tree) - 1
        full = layout.levels == self._options.ngram - 1
        if full:
            self.planner.learn(state.pace, 0, commit.accepted / layout.levels)
        self.planner.probed(state.pace, commit.accepted)
        if layout.columns:
            self._slide(seq, layout, self._answers(seq, layout, outcome), commit.accepted + 1)
        else:
            state.grid = []
        return commit

    def _answers(self, seq: Sequence, layout: _Layout, outcome: Outcome) -> list[int]:
        """What follows each column of the last level."""
        first = len(layout.tree)
        if seq.sampler.plain:
            return outcome.argmax[first : first + layout.columns].tolist()
        grid = seq.state.grid
        return [
            choose(seq, outcome, first + c, [*grid[0][: c + 1], *(level[c] for level in grid[1:])])
            for c in range(layout.columns)
        ]

    def _slide(self, seq: Sequence, layout: _Layout, answers: list[int], advance: int) -> None:
        """The answers become the newest level; the columns move on with the root."""
        state, window = seq.state, self._options.window
        grid = [level[: layout.columns] for level in state.grid] + [answers]
        if len(grid) == self._options.ngram:
            for column in zip(*grid, strict=True):
                self._put(state, column)
            grid = grid[1:]  # every level moves down, which is one position
            advance -= 1
        fill = seq.tokens[-window:] * window
        state.grid = [(level[advance:] + fill)[:window] for level in grid]


def visibility(parent: list[int], levels: int, columns: int) -> np.ndarray:
    """bool [n, n], n = len(parent) + levels * columns: row i sees row j."""
    t = len(parent)
    see = np.zeros((t + levels * columns,) * 2, bool)
    see[:, 0] = True
    for i, p in enumerate(parent):
        if p >= 0:
            see[i] = see[p]
        see[i, i] = True
    see[t:, t:] = _window(levels, columns)
    return see


@lru_cache(maxsize=64)
def _window(levels: int, columns: int) -> np.ndarray:
    l, c = (x.ravel() for x in np.indices((levels, columns)))
    first = (l == 0) & (c <= c[:, None])
    own = (c == c[:, None]) & (l <= l[:, None])
    return first | own
