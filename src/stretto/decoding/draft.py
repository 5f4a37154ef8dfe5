"""A second, smaller model drafts a chain or a tree; the target verifies it in one forward.

The drafts of all sequences grow together, one forward of the draft model per level. Behind a
verification the draft is a token or two behind the text, which it reads first in the next step.

acceptance="rejection": drafts are drawn from the draft's law and tried by rejection sampling
(Leviathan et al., arXiv 2211.17192; several children without replacement as in Sequoia, arXiv
2402.12374), so that the output follows the target's law. "coupled": drafts use the noise that the
target will use at their position, and the output is plain decoding's with the same seed, token for
token. Greedy decoding is the same by both.
"""

from __future__ import annotations

import time
from bisect import bisect
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stretto.decoding.ahead import Ahead
from stretto.decoding.ar import require_causal
from stretto.decoding.costs import INHERITED, Rates, allot
from stretto.decoding.drafting import DraftCache, DraftModel, Growth
from stretto.decoding.options import option
from stretto.decoding.planner import Pace, Planner, rested, room
from stretto.decoding.tree import Shape, best_first, chain
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
from stretto.models.batch import Doubt

__all__ = ["Draft", "Options"]

REPLAN = 16  # steps between two looks at the shape of a tree
PRIOR = (0.75, 0.12, 0.05, 0.03)  # acceptance of a right node's children by rank; then 0.02
SURE = (0.3, 0.5, 0.7, 0.85, 0.95, 0.99)  # classes of the draft's own largest probability
TRUST = (0.3, 0.45, 0.6, 0.75, 0.85, 0.95, 0.98)  # prior acceptance of each
NOTHING = Shape((), (), (), ())


@dataclass(frozen=True, kw_only=True)
class Options:
    """Speculative decoding with a draft model."""

    model: str = option("zoo:tiny-draft", "the draft: zoo name, directory or hub id; same tokenizer")
    num_draft_tokens: int = option(
        15, "most tokens drafted in a step: gamma, or the nodes of the tree", low=1, high=63
    )
    topk: int = option(1, "most children of a node; 1 = a chain", low=1, high=16)
    depth: int = option(
        0, "levels of the tree (0 = num_draft_tokens for a chain, else 4)", low=0, high=63
    )
    acceptance: str = option(
        "rejection", "how sampled drafts are tried", choices=("rejection", "coupled")
    )
    draft_method: str = option(
        "ar", "how the draft decodes: token by token, or ahead by prompt tokens (a chain; sampled drafts are coupled)",
        choices=("ar", "ppd"),
    )
    draft_adapter: str = option("auto", "the draft's prompt tokens: auto, zoo:NAME or a folder")


@dataclass(slots=True)
class _State:
    """``growth``: the drafts under verification. ``shape``: of the trees to come, ``age`` old."""

    pace: Pace
    cache: DraftCache
    growth: Growth | None = None
    shape: Shape = NOTHING
    age: int = 0


class Draft:
    """A small model guesses, the large one checks: the general-purpose speed-up at small batch."""

    name = "draft"
    lossless = True
    aliases = ("draft_model", "speculative")
    kinds = ("causal",)

    def __init__(self, host: Host, options: Options):
        self._host, self._options = host, options
        self._depth = _depth(options)
        runner = host.open_runner(options.model)
        if (kind := runner.config.attention) != "causal":
            wanted = f"a model with causal attention, not {kind}"
            raise OptionError("draft.model", options.model, wanted)
        ranks = [*PRIOR, *[0.02] * 16][: options.topk]
        self.planner = Planner(host, ranks * self._depth, draft=runner)
        self.model = DraftModel(runner, self.planner.draft)
        self._ahead = Ahead(host, runner, options.draft_adapter) if options.draft_method == "ppd" else None
        self._cap, self._age = self._depth, 0
        self._trust = Rates(TRUST, [4.0] * len(TRUST), 512)

    def admit(self, seq: Sequence) -> None:
        require_causal(self._host, self.name)
        seq.state = _State(self.planner.pace(), DraftCache(View(self.model.runner.alloc)))

    def prefill(self, seq: Sequence) -> int:
        return len(seq.tokens) - 1

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        if (resting := self.planner.rest(seqs, [s.state.pace for s in seqs])) is not None:
            return resting
        start, drafting = self.planner.begin(), 0.0
        for seq in seqs:
            seq.state.growth = None
            self.model.forget(seq.state.cache, len(seq.tokens) - 1)
        shapes = [self._shape(seq, len(seqs)) for seq in seqs]
        if any(s.gain for s in shapes):
            counts = self.planner.allot(
                seqs, [s.state.pace for s in seqs], [s.gain for s in shapes],
                depths=[s.depth for s in shapes], entry=self._entries(seqs, shapes),
            )
            drafting = self._draft([i for i in zip(seqs, shapes, counts, strict=True) if i[2]])
        steps = [
            Step([s.tokens[-1]]) if s.state.growth is None else s.state.growth.tree.step(s)
            for s in seqs
        ]
        self.planner.pause(start, drafting)
        return steps

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        if (commits := rested(seqs, steps, outcomes)) is not None:
            return commits
        start = time.perf_counter()
        commits = [self._commit(*item) for item in zip(seqs, steps, outcomes, strict=True)]
        self.planner.end(start, len(seqs), sum(c.drafted for c in commits))
        return commits

    def release(self, seq: Sequence) -> None:
        self.model.release(seq, seq.state.cache)
        seq.state = None

    def preemptible(self, seq: Sequence) -> bool:
        return True

    def _commit(self, seq: Sequence, step: Step, outcome: Outcome) -> Commit:
        state, growth = seq.state, seq.state.growth
        if growth is None:
            return accept_chain(seq, step.tokens, outcome)
        tree, single = growth.tree, self._options.topk == 1
        if growth.laws:
            commit = accept_rejection(seq, tree.tokens, tree.parent, growth.laws, outcome)
        elif single:
            commit = accept_chain(seq, tree.tokens, outcome)
        else:
            commit = accept_tree(seq, tree.tokens, tree.parent, outcome)
        if single:
            beyond = range(commit.drafted, self._depth)
            self._trust.learn_chain(growth.trust, commit.accepted)
            self.planner.judged(state.pace, growth.keys, commit.accepted, beyond)
        else:
            self.planner.judged_tree(state.pace, growth.keys, tree.parent, commit.keep, self._rest(growth))
        right = len(seq.tokens) + (commit.accepted if single else 0)
        self.model.keep(state.cache, right, commit.keep)
        state.growth = None
        return commit

    def _shape(self, seq: Sequence, batch: int) -> Shape:
        """What may be drafted now, best first."""
        state, options = seq.state, self._options
        limit = min(options.num_draft_tokens, room(seq))
        if not limit or self.planner.asleep(seq, state.pace):
            return NOTHING
        positions = self.model.runner.config.max_position_embeddings
        if len(seq.tokens) + self._depth > positions:
            seq.metrics.note(f"drafting stopped: the draft's context is {positions} tokens")
            return NOTHING
        if options.topk == 1:
            return chain(state.pace.rates.gains(range(limit)))
        if self._age % REPLAN == 0 and self.planner.active:
            self._cap = self._best_depth(batch, len(seq.tokens))
        self._age += 1
        if state.age % REPLAN == 0:
            state.shape = best_first(self._acc(state.pace.rates), options.num_draft_tokens, self._cap)
        state.age += 1
        s = state.shape
        return Shape(s.parent[:limit], s.rank[:limit], s.depth[:limit], s.gain[:limit])

    def _acc(self, rates: Rates) -> list[list[float]]:
        """acc[d][r] from the rates, falling with the rank; levels with few trials are like the one above."""
        shape = (self._depth, self._options.topk)
        out, n = np.reshape(rates.rate, shape), np.reshape(rates.trials, shape)
        for d in range(1, self._depth):
            out[d] = (n[d] * out[d] + INHERITED * out[d - 1]) / (n[d] + INHERITED)
        return np.minimum.accumulate(out, axis=1).tolist()

    def _best_depth(self, batch: int, context: int) -> int:
        """How many levels are worth their forwards, by the rates of all sequences."""
        acc, best, cap = self._acc(self.planner.shared), 0.0, 1
        nodes, draft = self._options.num_draft_tokens, self.planner.draft
        target = self.planner.target.table(context, batch * (1 + nodes))
        levels = [draft.scale * t for t in draft.table(context, batch * nodes)]
        for depth in range(1, self._depth + 1):
            shape = best_first(acc, nodes, depth)
            gains, depths = [shape.gain] * batch, [shape.depth] * batch
            _, rate = allot(gains, target, levels=levels, depths=depths)
            if rate > best:
                best, cap = rate, depth
        return cap

    def _entries(self, seqs: list[Sequence], shapes: list[Shape]) -> list[float] | None:
        """Seconds that the draft needs for the part of each text that it has not read."""
        draft, out = self.planner.draft, []
        if draft is None:
            return None
        for seq, shape in zip(seqs, shapes, strict=True):
            unread = len(seq.tokens) - len(seq.state.cache.view)
            if unread < 3 or not shape.gain:
                out.append(0.0)
            else:
                table = draft.table(len(seq.tokens), unread)
                out.append(draft.scale * (table[unread] - table[2]))
        return out

    def _rest(self, growth: Growth) -> range:
        """Keys of the levels that the tree did not reach."""
        return range(growth.tree.depth[-1] * self._options.topk, self._depth * self._options.topk)

    def _draft(self, wanted: list[tuple[Sequence, Shape, int]]) -> float:
        """Grow the drafts level by level, one forward a level for all sequences; its seconds."""
        start, model, single = time.perf_counter(), self.model, self._options.topk == 1
        model.expected = 0.0
        spare = self._ahead.room if self._ahead is not None else 0
        fits = model.fit([(seq, seq.state.cache, n + spare) for seq, _, n in wanted])
        level = []
        for seq, shape, count in wanted[:fits]:
            seq.state.growth = Growth(seq, shape, count)
            model.read(seq, seq.state.cache)
            level.append((seq.state.growth, 0))
        if self._ahead is not None and level:
            wanted = wanted[:fits]
            self._ahead.grow([(seq.state.growth, n) for seq, _, n in wanted])
            if model.costs is not None:
                table = model.costs.table(len(wanted[0][0].tokens), len(wanted))
                model.expected += table[len(wanted)] * max(n for _, _, n in wanted)
            level = []
        elif single and fits == 1 and wanted[0][0].sampler.plain:
            level = []
            model.chain(wanted[0][0].state.growth, wanted[0][0].state.cache, self._doubt())
        while level:
            rows = [model.rows(g, node, g.seq.state.cache, single) for g, node in level]
            logits = model.forward(rows)
            best = torch.argmax(logits, -1).tolist()
            sure = torch.softmax(logits, -1).amax(-1).tolist() if single else ()
            least = self.planner.level / len(level) + self.planner.row
            below = []
            for i, (growth, node) in enumerate(level):
                if single or node == 0:
                    growth.seq.state.cache.view.append(rows[i].slots)
                tokens = self._choose(growth, node, logits[i], best[i])
                children = growth.add(node, tokens, self._options.topk)
                if single and self._doubtful(growth, sure[i], least):
                    continue
                below += [(growth, child) for child in children]
            level = below
        seconds = time.perf_counter() - start
        if model.expected:
            model.costs.observe(seconds, model.expected)
        return seconds

    def _doubt(self) -> Doubt | None:
        """``_doubtful`` for a lone greedy chain, which grows without coming back here."""
        least = self.planner.level + self.planner.row
        return Doubt(SURE, self._trust.rate, 1.0, least) if self.planner.active else None

    def _doubtful(self, growth: Growth, sure: float, least: float) -> bool:
        """Whether the draft is too unsure of its last token for another level. The token itself stays: to drop
        it for its value would bend the law."""
        growth.trust.append(bisect(SURE, sure))
        growth.gain *= self._trust.rate[growth.trust[-1]]
        return self.planner.active and growth.gain * self._trust.rate[growth.trust[-1]] < least

    def _choose(self, growth: Growth, node: int, logits: Tensor, best: int) -> list[int]:
        """The children of ``node``, in the order in which they are tried."""
        sampler, k = growth.seq.sampler, growth.children(node)
        if sampler.plain:
            return [best] if k == 1 else torch.topk(logits, k).indices.tolist()
        path = [growth.tree.tokens[n] for n in growth.tree.path(node)]
        index = growth.seq.generated + len(path)
        if sampler.greedy:
            return torch.topk(sampler.process(logits, index, path), k).indices.tolist()
        law = sampler.law(logits, index, path).cpu().numpy()
        if self._options.acceptance == "coupled":
            return draw_without_replacement(law, noise(sampler.key, index, 0, len(law)), k)
        growth.laws[node] = law
        return draw_without_replacement(law, noise(sampler.key, index, DRAFT, len(law)), k)


def _depth(options: Options) -> int:
    """Levels of the tree; OptionError for sizes that do not go together."""
    nodes, k = options.num_draft_tokens, options.topk
    depth = options.depth or (nodes if k == 1 else min(4, nodes))
    if options.draft_method == "ppd" and k > 1:
        raise OptionError("draft.topk", k, "1 with draft_method=ppd: the draft hands over a chain")
    if depth > nodes or (k == 1 and depth != nodes):
        allowed = f"{nodes} for a chain" if k == 1 else f"at most {nodes}"
        allowed += f": num_draft_tokens is {nodes}, topk {k}"
        raise OptionError("draft.depth", depth, allowed)
    most = depth if k == 1 else (k ** (depth + 1) - k) // (k - 1)
    if nodes > most:
        allowed = f"at most {most}, all nodes of {depth} levels with topk {k}"
        raise OptionError("draft.num_draft_tokens", nodes, allowed)
    return depth
