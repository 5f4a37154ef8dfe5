"""Speculative decoding inside a memory budget.

At start the budget is turned into a plan (``decoding/memory.py``): slots of K/V, rows of the largest forward, drafts of
a step, and whether there is a draft at all. While the method has a sequence, the engine is held to it: the allocator
hands out no more slots, no forward has more rows. Drafts take what the sequences leave of the slots: they shrink, down
to plain decoding, before any sequence would have to give its cache back, and grow again later. Text is plain
decoding's at every budget. (SpecMemo, arXiv 2506.01986.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from stretto.decoding.ar import require_causal
from stretto.decoding.memory import Plan, Side, estimate, least, parse_size, show, side_of, solve, used
from stretto.decoding.options import option
from stretto.decoding.registry import make
from stretto.engine.host import Host
from stretto.engine.runner import Runner
from stretto.engine.types import Commit, Outcome, Sequence, Step
from stretto.errors import CapacityError, OptionError

__all__ = ["Options", "SpecMemo"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """A budget for speculative decoding (SpecMemo, 2025)."""

    budget: str = option("24MiB", "generation memory, all beyond the target's weights: 512KiB, 24MiB, 1.5GB")
    context: int = option(0, "tokens of a sequence that must fit; 0 = the model's own limit", low=0)
    sequences: int = option(1, "sequences of that length that should fit side by side", low=1, high=4096)
    drafter: str = option("draft", "what drafts", choices=("draft", "suffix", "ngram"))
    model: str = option("zoo:tiny-draft", "the draft of drafter=draft: zoo name, directory or hub id")
    num_draft_tokens: int = option(8, "most tokens drafted in a step", low=1, high=63)


class SpecMemo:
    """Speculative decoding that never uses more memory than it was given; refuses at start what cannot work."""

    name = "specmemo"
    lossless = True
    kinds = ("causal",)

    def __init__(self, host: Host, options: Options):
        require_causal(host, self.name)
        runner = host.runner
        self._host, self._o = host, options
        self.budget = parse_size(options.budget)
        self._draft = host.open_runner(options.model) if options.drafter == "draft" else None
        target, draft = side_of(runner), side_of(self._draft) if self._draft is not None else None
        if self._draft is None:  # these draft without a model: only their rows cost
            draft = Side(0, 0, 0, 0, 0)
        self.plan = self._solve(target, draft)
        self.predicted = estimate(target, draft, self.plan)
        self.slots = min(self.plan.slots, runner.alloc.total)
        self._live = 0
        runner.hold(self.slots, self.plan.rows)  # what the drafter measures at start keeps to the plan, too
        try:
            self._inner = self._drafter()
        finally:
            runner.lift(self.slots, self.plan.rows)
        self._allowed = self.plan.nodes

    def _solve(self, target: Side, draft: Side) -> Plan:
        o, host = self._o, self._host
        context = min(o.context or host.max_model_len, host.max_model_len)
        plan = solve(
            target, draft, self.budget, context=context, sequences=o.sequences, most_nodes=o.num_draft_tokens + 1,
        )
        plain, speculative = least(target, None, context), least(target, draft, context)
        if plan is None:
            raise OptionError("specmemo.budget", o.budget, _refusal(plain, target, self.budget, context))
        if not plan.draft:
            host.notes.append(
                f"specmemo: no drafts within {show(self.budget)}: one sequence of {context} tokens takes "
                f"{show(plain['total'])} without them and {show(speculative['total'])} with them"
            )
        if plan.sequences < o.sequences:
            host.notes.append(
                f"specmemo: {plan.sequences} of {o.sequences} sequences of {context} tokens fit into "
                f"{show(self.budget)} side by side"
            )
        return plan

    def _drafter(self):
        """The method that drafts, on a host whose second model keeps to the plan too; plain decoding without drafts."""
        plan, draft, o = self.plan, self._draft, self._o
        if not plan.draft:
            self._draft = None
            return make("ar", self._host, {})
        if draft is None:
            length = {"suffix": "max_draft", "ngram": "num_draft_tokens"}
            return make(o.drafter, self._host, _fitting(o.drafter, length[o.drafter], plan.nodes - 1))
        draft.max_rows = plan.rows
        if plan.slots < draft.alloc.total:
            draft.alloc.limit(plan.slots)

        def opened(name: str) -> Runner:
            assert draft is not None
            return draft

        host = replace(self._host, open_runner=opened)  # coupled: sampled text, too, is the same at every budget
        return make("draft", host, {"model": o.model, "num_draft_tokens": plan.nodes - 1, "acceptance": "coupled"})

    def used(self) -> Mapping[str, int]:
        """Bytes by part: the most that was in use at one time since the model was loaded, by whatever method."""
        return used(self._host.runner, self._draft)

    def admit(self, seq: Sequence) -> None:
        need = len(seq.tokens) + seq.params.max_tokens + self.plan.nodes
        if need > self.slots:
            raise CapacityError(
                f"the request may need {need} cache slots, the budget of {show(self.budget)} has {self.slots}: lower "
                "max_tokens, shorten the prompt, or raise the budget"
            )
        self._inner.admit(seq)
        if not self._live:
            self._host.runner.hold(self.slots, self.plan.rows)
        self._live += 1

    def prefill(self, seq: Sequence) -> int:
        return self._inner.prefill(seq)

    def propose(self, seqs: list[Sequence]) -> list[Step]:
        """Drafts get the slots that the sequences leave, evenly; they grow again when twice as much is there."""
        nodes, n = self.plan.nodes, len(seqs)
        spare = self.slots - sum(s.computed + 1 for s in seqs)
        room = min(nodes, 1 + max(0, spare) // n)
        if room < self._allowed or room >= min(nodes, 2 * self._allowed):
            self._allowed = room
        for seq in seqs:
            if self._allowed < nodes:
                seq.metrics.note(f"drafts cut to {self._allowed - 1} tokens: the cache is nearly full")
            seq.row_limit = min(seq.row_limit, self._allowed)
        return self._inner.propose(seqs)

    def commit(
        self, seqs: list[Sequence], steps: list[Step], outcomes: list[Outcome]
    ) -> list[Commit]:
        return self._inner.commit(seqs, steps, outcomes)

    def release(self, seq: Sequence) -> None:
        self._inner.release(seq)
        self._live -= 1
        if not self._live:
            self._host.runner.lift(self.slots, self.plan.rows)

    def preemptible(self, seq: Sequence) -> bool:
        return self._inner.preemptible(seq)


def _fitting(drafter: str, name: str, n: int) -> dict[str, int]:
    """The drafter's own option for its length, where it has one of that name."""
    from stretto.decoding.registry import get

    return {name: n} if name in {o.name for o in get(drafter).options} else {}


def _refusal(plain: Mapping[str, int], target: Side, budget: int, context: int) -> str:
    """What the least is, what it is made of, and what would fit."""
    parts = ", ".join(f"{k} {show(v)}" for k, v in plain.items() if v and k != "total")
    fits = context - -(-(plain["total"] - budget) // target.kv)
    instead = f"context={fits} would fit" if fits >= 1 else "not even one token of context fits"
    least_words = f"at least {show(plain['total'])} ({plain['total']} bytes) for {context} tokens of context"
    return f"{least_words} ({parts}); {instead}"
