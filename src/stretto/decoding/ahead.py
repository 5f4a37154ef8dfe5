"""A draft model that finishes several of its own tokens per forward, by prompt tokens.

The draft decodes for itself as ``ppd`` does for a target: a tree of guesses with slots, checked by its own choice, so
that the chain it hands over is the one that it would have drafted token by token, only in fewer forwards.
(PPD, arXiv 2405.18628, section 5.3.)
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from stretto.decoding.drafting import DraftCache, Growth
from stretto.decoding.ppd import prompt_slots
from stretto.decoding.slotted import ROWS, State
from stretto.engine.host import Host
from stretto.engine.pack import Plan, pack
from stretto.engine.runner import Runner
from stretto.engine.types import Outcome, Sequence

__all__ = ["Ahead"]


class Ahead:
    """``adapter``: prompt tokens of the draft."""

    def __init__(self, host: Host, runner: Runner, adapter: str):
        own = Host(runner, host.stop_ids, host.max_model_len, host.open_runner, host.plan, parts=host.parts)
        self.runner, self.slotted = runner, prompt_slots(own, own.open_adapter("ppd", adapter))

    room = ROWS  # slots of the draft's cache that a forward may need for a while

    def grow(self, wanted: Seq[tuple[Growth, int]]) -> None:
        """Give every growth its chain of as many drafts."""
        twins = [(self._twin(growth.seq, growth.seq.state.cache), growth, n) for growth, n in wanted]
        while twins:
            steps = self.slotted.steps([twin for twin, _, _ in twins])
            plans = []
            for (twin, _, _), step in zip(twins, steps, strict=True):
                plan = Plan(twin, len(twin.tokens) - 1 - len(twin.view), step)
                plan.slots = self.runner.alloc.alloc(plan.rows)
                plans.append(plan)
            result = self.runner.forward(pack(plans))
            rest = []
            for (twin, growth, n), plan in zip(twins, plans, strict=True):
                outcome = Outcome(result.logits, result.argmax, plan.logit, plan.logit + plan.logits, {}, slice(0, 0))
                if self._take(twin, growth, n, plan, outcome):
                    rest.append((twin, growth, n))
            twins = rest

    def _twin(self, seq: Sequence, cache: DraftCache) -> Sequence:
        """The sequence as the draft sees it: the same tokens and sampler, the draft's own cache."""
        twin = Sequence(
            seq.id, list(seq.tokens), seq.prompt_len, seq.params, seq.method, cache.view, seq.sampler, seq.choice,
        )
        twin.state, twin.computed = State(self.slotted.planner.pace()), len(twin.tokens) - 1
        return twin

    def _take(self, twin: Sequence, growth: Growth, n: int, plan: Plan, outcome: Outcome) -> bool:
        """Write one forward's tokens into the growth; whether more are wanted."""
        commit = self.slotted.verified(twin, plan.step, outcome)
        rows = [*range(plan.lead), *(plan.lead + r for r in commit.keep)]
        kept = set(rows)
        twin.view.append(plan.slots[rows])
        self.runner.alloc.release(plan.slots[[r for r in range(plan.rows) if r not in kept]])
        for token in commit.tokens:
            node = len(growth.tree) - 1
            if node < n:
                growth.add(node, [int(token)], 1)
        twin.tokens += commit.tokens
        twin.computed = len(twin.tokens) - 1
        return len(growth.tree) - 1 < n
