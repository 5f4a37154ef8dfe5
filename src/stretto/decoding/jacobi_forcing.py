"""Multi-block Jacobi decoding with rejection recycling, for models distilled to converge in a few forwards.

A block is n tokens: its seed, known right, and guesses. Its rows are evaluated together; the guesses that equal the
answers before them are final, the answers behind them are the next guesses. When ``spawn_ratio`` of the newest block is
accepted, the next block is spawned behind it, so that its guesses mature while this one ends. Rejected guesses go to a
pool; where a pooled text contains the new root, what followed it there is verified beside the block, as a branch.
(Jacobi Forcing, arXiv 2512.14681, sections 4.1 and 4.2. There a spawned block is evaluated anew once it is promoted;
here its rows already count in the forward in which everything before them turns out right: they saw the right tokens.)
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from math import ceil

from stretto.decoding.ar import require_causal
from stretto.decoding.jacobi import answers_along, settle
from stretto.decoding.options import option
from stretto.decoding.planner import Pace, Planner, rested, room
from stretto.decoding.tree import Tree
from stretto.decoding.verify import accept_chain, accept_tree
from stretto.engine.host import Host
from stretto.engine.types import Commit, Outcome, Sequence, Step

__all__ = ["JacobiForcing", "Options"]

BLOCK, BRANCH = 0, 1  # keys of the planner's rates: tokens that a step's blocks give, that its branches give on top
COLD = 2  # steps that guesses take to be worth anything; they count as the price of beginning
PROBE_BRANCH = 16  # steps of one sequence to one whose branches are verified although they do not pay


@dataclass(frozen=True, kw_only=True)
class Options:
    """Jacobi decoding of several blocks (Jacobi Forcing, 2025); small defaults, for a forward of about 8 rows."""

    block_size: int = option(8, "n: tokens of a block, the known first one included", low=2, high=64)
    num_blocks: int = option(2, "K: most blocks in flight", low=1, high=8)
    spawn_ratio: float = option(
        0.25, "r: accepted share of the newest block from which the next one is spawned", low=0.01, high=1.0
    )
    pool_size: int = option(4, "rejected texts that are remembered; 0 = no recycling", low=0, high=64)
    max_candidates: int = option(1, "recycled branches verified in a step", low=1, high=16)
    init: str = option("context", "what an unknown guess starts as", choices=("context", "repeat", "pad"))


@dataclass(slots=True)
class _State:
    """``guesses`` for the tokens behind the root; ``end``: position behind the newest block; ``ripe``: leading
    tokens of the newest block that survived the last step; ``warm``: steps since the guesses began; ``pool``: rejected
    texts, newest last."""

    pace: Pace
    pool: deque[list[int]]
    guesses: list[int] = field(default_factory=list)
    end: int = 0
    ripe: int = 0
    warm: int = 0
    steps: int = 0


@dataclass(frozen=True, slots=True)
class _Layout:
    """Rows of a step: the root and the blocks (``chain`` rows in all), then the branches of ``tree``."""

    tree: Tree
    chain: int


class JacobiForcing:
    """Fixes several tokens a forward without any draft: pays for models distilled by Jacobi Forcing."""

    name = "jacobi_forcing"
    lossless = True
    aliases = ("jacobi_multiblock",)
    kinds = ("causal",)

    def __init__(self, host: Host, options: Options):
        self._host, self._o = host, options
        self._pad = host.config.pad_token_id or 0
        self.planner = Planner(host, [0.5 * options.block_size, 0.0], probe=1, patience=COLD + 3)

    def admit(self, seq: Sequence) -> None:
        require_causal(self._host, self.name)
        seq.state = _State(self.planner.pace(), deque(maxlen=self._o.pool_size))

    def prefill(self, seq: Sequence) -> int:
        return len(seq.tokens) - 1

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        paces = [s.state.pace for s in seqs]
        if (resting := self.planner.rest(seqs, paces)) is not None:
            return resting
        start = self.planner.begin()
        wanted = [self._window(seq) for seq in seqs]
        offers = [[s.state.pace.rates.rate[BLOCK]] if n else [] for s, n in zip(seqs, wanted, strict=True)]
        prices = [self._price(s, n) for s, n in zip(seqs, wanted, strict=True)]
        counts = self.planner.allot(
            seqs, paces, offers, width=max(1, *wanted), entry=prices,
            tag=(max(wanted), prices[0] > 0.0),
        )
        steps = [
            self._step(seq, n) if take else Step([seq.tokens[-1]])
            for seq, n, take in zip(seqs, wanted, counts, strict=True)
        ]
        self.planner.pause(start)
        return steps

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        if (plain := rested(seqs, steps, outcomes)) is not None:
            for seq in seqs:
                seq.state.guesses, seq.state.warm = [], 0
            return plain
        start = time.perf_counter()
        commits = [self._commit(*item) for item in zip(seqs, steps, outcomes, strict=True)]
        self.planner.end(start, len(seqs), sum(map(len, steps)) - len(seqs))
        return commits

    def release(self, seq: Sequence) -> None:
        seq.state = None

    def preemptible(self, seq: Sequence) -> bool:
        return True

    def _price(self, seq: Sequence, n: int) -> float:
        """Seconds until the guesses are worth their rows."""
        target, cold = self.planner.target, COLD - seq.state.warm
        if target is None or cold <= 0 or not n:
            return 0.0
        table = target.table(len(seq.tokens), n + 1)
        return cold * (table[n + 1] - table[1])

    def _window(self, seq: Sequence) -> int:
        """How many guesses are in flight now; opens and spawns blocks."""
        state, o, root = seq.state, self._o, len(seq.tokens) - 1
        if not room(seq) or self.planner.asleep(seq, state.pace):
            return 0
        if root >= state.end:
            state.end, state.ripe = root + o.block_size, 1
        flying = ceil((state.end - root) / o.block_size)
        if flying < o.num_blocks and state.ripe >= ceil(o.spawn_ratio * o.block_size):
            state.end += o.block_size
            state.ripe = 0
        return min(state.end - 1 - root, room(seq))

    def _step(self, seq: Sequence, n: int) -> Step:
        state = seq.state
        if missing := n - len(state.guesses):
            state.guesses += self._fill(seq, missing)
        chain = [seq.tokens[-1], *state.guesses[:n]]
        if not state.pool or not self._branches_pay(seq):
            return Step(chain)
        tree = Tree.rooted(chain[0])
        for i, token in enumerate(chain[1:]):
            tree.add(i, token)
        self._recycle(seq, tree, n)
        if len(tree) == len(chain):
            return Step(chain)
        return tree.step(seq, _Layout(tree, len(chain)))

    def _fill(self, seq: Sequence, n: int) -> list[int]:
        """``n`` guesses for tokens that nothing is known of: n > 0 drops none, n < 0 gives none."""
        if self._o.init == "pad":
            return [self._pad] * n
        if self._o.init == "repeat":
            return (seq.tokens[-n:] * n)[:n] if n > 0 else []
        at, text = len(seq.tokens), seq.tokens
        return [text[(at + i) * 2654435761 % at] for i in range(n)]

    def _branches_pay(self, seq: Sequence) -> bool:
        """Whether the branches gave more tokens in their rows than the rows' time gives elsewhere."""
        state = seq.state
        state.steps += 1
        rows = self._o.max_candidates * self._o.block_size / 2
        gain = state.pace.rates.rate[BRANCH]
        return not self.planner.active or gain > rows * self.planner.row or state.steps % PROBE_BRANCH == 0

    def _recycle(self, seq: Sequence, tree: Tree, n: int) -> None:
        """Hang what followed the root in pooled texts beside the blocks, newest first."""
        root, found = seq.tokens[-1], 0
        for text in reversed(seq.state.pool):
            if found == self._o.max_candidates:
                return
            if root not in text[:-1]:
                continue
            at, node, before = text.index(root) + 1, 0, len(tree)
            for token in text[at : at + min(n, self._o.block_size - 1)]:
                if len(tree) == seq.row_limit:
                    return
                node = tree.add(node, token)
            found += len(tree) > before

    def _commit(self, seq: Sequence, step: Step, outcome: Outcome) -> Commit:
        state, layout = seq.state, step.extra
        if len(step) == 1:
            state.guesses, state.warm = [], 0
            return accept_chain(seq, step.tokens, outcome)
        m = (len(step) if layout is None else layout.chain) - 1
        answers = answers_along(seq, step.tokens[: m + 1], outcome)
        hits = 0
        while hits < m and answers[hits] == step.tokens[hits + 1]:
            hits += 1
        if state.warm >= COLD:
            self.planner.learn(state.pace, BLOCK, hits)
        state.warm += 1
        self.planner.probed(state.pace, hits)
        old = state.guesses
        if m - hits > 1:
            state.pool.append(old[hits:m])
        state.ripe = self._ripe(seq, old, answers, hits, m)
        commit = None
        if layout is not None:
            commit = accept_tree(seq, layout.tree.tokens, layout.tree.parent, outcome)
            self.planner.learn(state.pace, BRANCH, max(0, commit.accepted - hits))
        if commit is not None and commit.accepted > hits:
            state.guesses = self._behind(layout.tree, commit.keep[-1], outcome)
            state.ripe = min(state.ripe, len(state.guesses))
        else:
            state.guesses = settle(old, answers, hits)
            commit = Commit(
                tokens=answers[: hits + 1], keep=range(hits + 1), accepted=hits, logprob_rows=range(hits + 1)
            )
        commit.drafted = len(step) - 1
        return commit

    def _ripe(self, seq: Sequence, old: list[int], answers: list[int], hits: int, m: int) -> int:
        """Leading tokens of the newest block that are final or did not change in this step."""
        first = seq.state.end - self._o.block_size - len(seq.tokens)  # index of its seed in ``old``
        i = max(first, 0)
        while i < m and old[i] == answers[i]:
            i += 1
        return max(i, hits + 1) - first

    def _behind(self, tree: Tree, row: int, outcome: Outcome) -> list[int]:
        """The answers along the branch behind the last accepted ``row``: the next guesses behind the new root."""
        rows, node = [], row
        while (below := next((i for i in range(node + 1, len(tree)) if tree.parent[i] == node), 0)):
            rows.append(below)
            node = below
        return [int(outcome.argmax[i]) for i in rows]
