"""Which sequences take part in the next forward, with which rows, in which slots. No tensor is touched here.

Each turn: running sequences in (priority, arrival) order propose; those that still have prompt to cache get chunks of
what is left of the row budget; then, if nobody was preempted, waiting ones are admitted. When slots run out,
unused prefix blocks go first, then the least important running sequence gives its cache back and waits: its
tokens are evaluated again later (preemption by recomputation). The most important one is never a victim.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from stretto.engine.cache import PrefixCache
from stretto.engine.pack import Plan
from stretto.engine.runner import Runner
from stretto.engine.team import units, whole
from stretto.engine.types import Method, Sequence
from stretto.errors import CapacityError

__all__ = ["Entry", "Scheduler"]


@dataclass(slots=True, eq=False)
class Entry:
    """A sequence in the queues. ``forks``: what starts when its prompt is cached, further choices of it or texts that
    begin with it."""

    seq: Sequence
    priority: int
    arrival: int
    forks: list[Entry] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, int]:
        return self.priority, self.arrival

    @property
    def rides(self) -> bool:
        """Whether it may go in the forward that evaluates the beginning of its text (``Method.rides``)."""
        return self.seq.held and getattr(self.seq.method, "rides", False)


def _late(plan: Plan) -> bool:
    """Prompts come after steps; who rides, with its base."""
    first = plan.base or plan
    return first.step is None or first.lead > 0


class Scheduler:
    """``max_rows``: rows of one forward; ``max_seqs``: sequences that run at the same time; ``block``: chunks of a
    prompt end on multiples of it (block-causal models)."""

    def __init__(
        self, runner: Runner, prefix: PrefixCache | None, *, max_rows: int, max_seqs: int, block: int = 1,
    ):
        self.waiting: list[Entry] = []
        self.running: list[Entry] = []
        self.preemptions = 0
        self._riders: dict[Sequence, tuple[Entry, Entry]] = {}  # of the forward to come: (whom with, itself)
        self._alloc, self._prefix, self._runner = runner.alloc, prefix, runner
        self.max_rows, self._max_seqs, self._block = max_rows, max_seqs, block

    def add(self, entry: Entry) -> None:
        self.waiting.append(entry)
        self.waiting.sort(key=lambda e: e.rank)

    def remove(self, entry: Entry) -> None:
        """Forget an entry wherever it is; its view is released, unless it is lent."""
        for queue in (self.waiting, self.running):
            if entry in queue:
                queue.remove(entry)
        if not entry.seq.held:
            entry.seq.view.release()

    def plan(self) -> list[Plan]:
        """The plans of the next forward, slots allotted; empty when there is nothing to do."""
        before = self.preemptions
        self._alloc.tidy()
        self._admit()
        self._riders.clear()
        plans = self._allot(self._prompts(self._proposals()))
        if self._riders:
            self._seat(plans)
        if self.preemptions == before and not plans and whole(self.running):
            lent = sum(e.seq.held for e in self.running)
            if lent:
                raise CapacityError(
                    f"{lent} threads of sessions need more rows than the cache has left ({self._alloc.free} of "
                    f"{self._alloc.total} slots): raise kv_cache_tokens, or fork fewer threads"
                )
            raise AssertionError("running sequences, but no plan")
        return plans

    def _admit(self) -> None:
        """Start waiting entries while there is room; a team starts as a whole, and who comes back to one that runs
        has its seat."""
        if not self.waiting:
            return
        teams = {e.seq.team for e in self.running if e.seq.team is not None}
        self._start([e for e in self.waiting if e.seq.team in teams])
        while self.waiting and len(self.running) < self._max_seqs:
            entry = self.waiting[0]
            seq = entry.seq
            mates = [entry] if seq.team is None else [e for e in self.waiting if e.seq.team is seq.team]
            if self.running and len(self.running) + len(mates) > self._max_seqs:
                return
            if not len(seq.view) and self._prefix is not None and seq.plain and seq.method.prefill(seq):
                seq.metrics.cached_tokens = self._prefix.attach(
                    seq.view, seq.tokens, seq.prefix_salt, seq.method.prefill(seq)
                )
            need = sum(len(e.seq.tokens) - len(e.seq.view) + 16 for e in mates)
            if self.running and need > self._alloc.free:
                self._reclaim(need)
                if need > self._alloc.free:
                    if not seq.held:
                        seq.view.release()
                    return
            self._start(mates)

    def _start(self, entries: list[Entry]) -> None:
        for entry in entries:
            if entry.seq.metrics.started is None:
                entry.seq.metrics.started = time.perf_counter()
            self.waiting.remove(entry)
            self.running.append(entry)
        self.running.sort(key=lambda e: e.rank)

    def spawn(self, entry: Entry) -> None:
        """Fork what waits for the prompt of ``entry``, if it is cached; threads wait for the whole of it."""
        seq, forks = entry.seq, entry.forks
        if not forks or len(seq.view) < (len(seq.tokens) if forks[0].seq.held else seq.method.prefill(seq)):
            return
        for fork in forks:
            fork.seq.view.adopt(seq.view)
            fork.seq.metrics.cached_tokens = len(seq.view)
            self.add(fork)
        entry.forks = []

    def _ride(self, plan: Plan, entry: Entry, left: int) -> list[Plan]:
        """Plans of what waits for ``plan``, to go in the same forward; none where not all of it has room."""
        line, forks = entry.seq.tokens, entry.forks
        rows = sum(len(f.seq.tokens) - len(line) for f in forks)
        seats = self._max_seqs - len(self.running) - len(self._riders)
        if not all(f.rides for f in forks) or len(forks) > seats or plan.lead + 1 + rows > min(left, self._alloc.free):
            return []
        out = []
        for fork in forks:
            seq = fork.seq
            out.append(Plan(seq, seq.method.prefill(seq) - len(line), base=plan))
            seq.computed = seq.method.prefill(seq)
            self._riders[seq] = entry, fork
        return out

    def _seat(self, plans: list[Plan]) -> None:
        """Who rides in this forward runs from now on."""
        for plan in plans:
            if plan.base is not None:
                entry, fork = self._riders[plan.seq]
                entry.forks.remove(fork)
                fork.seq.metrics.cached_tokens = len(entry.seq.tokens)
                fork.seq.metrics.started = time.perf_counter()
                self.running.append(fork)
        self.running.sort(key=lambda e: e.rank)

    def _proposals(self) -> list[Plan]:
        """A plan for each running sequence: with a step where its method can run now."""
        for entry in self.running:
            self.spawn(entry)
        left = self._rows()
        plans, ready = [], []
        for entry in whole(self.running):
            seq = entry.seq
            lead = max(0, seq.method.prefill(seq) - len(seq.view))
            plan = Plan(seq, lead)
            plans.append(plan)
            riders = self._ride(plan, entry, left) if entry.forks else []
            if lead == 0 or (lead < left and (riders or not entry.forks or entry.forks[0].rides)):
                seq.computed = len(seq.view) + lead
                left -= lead + sum(r.lead for r in riders)
                ready += [plan, *riders]
                plans += riders
        by_method: dict[Method, list[Plan]] = {}
        limit = max(1, left // max(1, len(ready)))
        for plan in ready:
            plan.seq.row_limit = limit
            by_method.setdefault(plan.seq.method, []).append(plan)
        for method, group in by_method.items():
            for plan, step in zip(group, method.propose([p.seq for p in group]), strict=True):
                plan.put(step)
        return plans

    def _prompts(self, plans: list[Plan]) -> list[Plan]:
        """Clip to the row budget: steps first, then chunks of prompts. A step that does not fit waits."""
        left, out = self._rows(), []
        if all(p.step is not None for p in plans) and sum(p.rows for p in plans) <= left:
            return plans
        for unit in units(sorted(plans, key=_late)):
            rows = sum(p.rows for p in unit)
            if all(p.step is not None for p in unit) and (rows <= left or not out):
                left -= rows
                out += unit
                continue
            for plan in unit:
                if plan.lead and left > 0 and plan.seq.team is None and plan.base is None:
                    plan.put(None, self._chunk(plan, left))
                    left -= plan.lead
                    if plan.lead:
                        out.append(plan)
        return out

    def _rows(self) -> int:
        """Most rows of the next forward."""
        most = self._runner.max_rows
        return self.max_rows if most is None else min(self.max_rows, most)

    def _chunk(self, plan: Plan, left: int) -> int:
        if plan.lead <= left:
            return plan.lead
        start = len(plan.seq.view)
        return max(0, (start + left) // self._block * self._block - start)

    def _allot(self, plans: list[Plan]) -> list[Plan]:
        """Give each plan its slots; preempt from the back when they run out."""
        wanted = sum(p.rows for p in plans)
        if self._alloc.shares and wanted <= self._alloc.free:  # any slot will do
            slots, at = self._alloc.alloc(wanted), 0
            for plan in plans:
                plan.slots = slots[at : at + plan.rows]
                at += plan.rows
            return plans
        rank = {e.seq: e.rank for e in self.running}
        own = (p for p in plans if p.base is None)  # nobody rides where room is tight
        plans = sorted(own, key=lambda p: rank[p.seq])
        done: list[Plan] = []
        for plan in plans:
            if plan.seq not in rank:
                continue  # preempted while this forward was planned
            self._reclaim(plan.rows)
            while plan.rows > self._alloc.room(plan.seq.view) and (victim := self._victim(plan.seq)):
                for other in [p for p in done if p.seq is victim.seq]:
                    self._alloc.release(other.slots)
                    done.remove(other)
                rank.pop(victim.seq)
                self._preempt(victim)
                if victim.seq is plan.seq:
                    break
                self._reclaim(plan.rows)
            if plan.seq in rank and plan.rows <= self._alloc.room(plan.seq.view):
                plan.slots = self._alloc.alloc(plan.rows, plan.seq.view)
                done.append(plan)
        kept = {id(p) for p in whole(done)}
        for plan in done:
            if id(plan) not in kept:
                self._alloc.release(plan.slots)
        return [p for p in done if id(p) in kept]

    def _reclaim(self, rows: int) -> None:
        if self._prefix is not None and rows > self._alloc.free:
            self._prefix.evict(rows - self._alloc.free)

    def _victim(self, asking: Sequence) -> Entry | None:
        """The least important running entry behind ``asking``, down to ``asking`` itself; the first is never one."""
        for entry in reversed(self.running[1:]):
            if not entry.seq.held and entry.seq.method.preemptible(entry.seq):
                return entry
            if entry.seq is asking:
                return None
        return None

    def _preempt(self, entry: Entry) -> None:
        self.preemptions += 1
        entry.seq.metrics.preemptions += 1
        entry.seq.view.release()
        self.running.remove(entry)
        self.add(entry)
