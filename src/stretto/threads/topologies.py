"""The four topologies of AdaptOrch (2026), as programs over agents.

parallel: one agent for each sub-task, told its instruction and the results of its direct predecessors, if it has any.
sequential: one after the other in topological order, each reads all earlier answers in full. hybrid: pairs of critical
coupling are one agent; the others read their direct predecessors, in full from coupling strong on, else the result
alone. hierarchical: a lead writes a plan for all, workers read it and their predecessors in full, the lead reads all
reports and may send each worker back once.

A program fills ``Work.reports``; what is there already (reused) is not done again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from stretto.errors import InputError
from stretto.threads.desk import Desk, run_ready
from stretto.threads.task_graph import COUPLING, TaskGraph
from stretto.zoo.pages.orchestra import AGAIN, CHECK, PLAN, agent_text, claims

__all__ = ["PROGRAMS", "Report", "Work", "groups_of", "hierarchical", "hybrid", "parallel", "sequential"]

MISSING = "missing"
SHORT = 200  # characters of a summary where an answer states no result


@dataclass(slots=True)
class Report:
    """What a sub-task came back with. ``call``: its number in the trace; ``failed``: no answer came."""

    id: str
    text: str
    call: int
    failed: bool = False

    @property
    def value(self) -> str | None:
        """The result it states, "id = value"."""
        return None if self.failed else claims(self.text).get(self.id)

    @property
    def short(self) -> str:
        """The result alone: what is passed on where the content does not matter."""
        if self.failed:
            return f"{self.id}: {self.id} = {MISSING}"
        if self.value is not None:
            return f"{self.id}: {self.id} = {self.value}"
        lines = [line for line in self.text.splitlines() if line.strip()]
        return f"{self.id}: {lines[-1].strip()[-SHORT:]}" if lines else f"{self.id}: {MISSING}"

    @property
    def full(self) -> str:
        if self.failed:
            return self.short
        return self.text if self.text.startswith(f"{self.id}:") else f"{self.id}: {self.text}"


@dataclass
class Work:
    """A round under way. ``blind``: parallel passes nothing on (the paper's plain form, for comparison). ``refused``:
    id -> values that the validator did not accept in earlier rounds; who is asked again is told of them."""

    graph: TaskGraph
    desk: Desk
    reports: dict[str, Report] = field(default_factory=dict)
    blind: bool = False
    refused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def text_of(self, i: int) -> tuple[str, str]:
        node = self.graph.nodes[i]
        return node.id, node.instruction

    async def do(
        self, ids: Sequence[int], seen: Sequence[tuple[int, bool]], *, plan: str = "", after: Iterable[int] = (),
        said: Sequence[str] = (), role: str = "worker",
    ) -> None:
        """One call for the sub-tasks ``ids``; ``seen``: others whose reports it reads, and whether in full."""
        tokens = self.desk.limits.call_tokens * len(ids)
        pairs = [self.text_of(i) for i in ids]
        said = said or self.doubts([p[0] for p in pairs])
        before = [(self.reports[self.graph.nodes[u].id], full) for u, full in seen]

        def text(full: Callable[[bool], bool]) -> str:
            known = [r.full if full(f) else r.short for r, f in before]
            return agent_text(pairs, known=known, plan=plan, said=said)

        content = text(lambda f: f)
        if not self.desk.fits(content, tokens):
            content = text(lambda f: False)
            self.notes.append(f"{'+'.join(p[0] for p in pairs)}: the results of others were cut to fit the context")
        calls = sorted({r.call for r, _ in before} | set(after))
        call = await self.desk.ask(role, [p[0] for p in pairs], content, tokens=tokens, after=calls)
        for id, part in split_lines(call.text, [p[0] for p in pairs]).items():
            self.reports[id] = Report(id, part, call.number, failed=call.error is not None or not part.strip())
        if call.error:
            self.notes.append(f"{'+'.join(p[0] for p in pairs)} failed: {call.error}")

    def doubts(self, ids: Iterable[str]) -> list[str]:
        """What was refused of these, as an agent is told."""
        return [f"{i} = {v}" for i in ids for v in self.refused.get(i, ())]

    def todo(self, ids: Iterable[int]) -> list[int]:
        return [i for i in ids if self.graph.nodes[i].id not in self.reports]


def split_lines(text: str, ids: Sequence[str]) -> dict[str, str]:
    """Each id's part of an answer: from "id:" to the next one's; all of it where there is only one id."""
    if len(ids) == 1:
        return {ids[0]: text.strip()}
    starts = [(m.start(), i) for i in ids if (m := re.search(rf"(?m)^\s*{re.escape(i)}:", text))]
    starts.sort()
    ends = [*(s for s, _ in starts[1:]), len(text)]
    found = {i: text[s:e].strip() for (s, i), e in zip(starts, ends, strict=False)}
    return {i: found.get(i, "") for i in ids}


async def parallel(work: Work) -> None:
    """No agent reads more than the results of its direct predecessors."""
    graph = work.graph
    todo = work.todo(graph.order)
    left = set(todo)

    async def one(i: int) -> None:
        await work.do([i], [] if work.blind else [(u, False) for u, _ in sorted(graph.preds[i])])

    needs = {i: [] if work.blind else [u for u, _ in graph.preds[i] if u in left] for i in todo}
    await run_ready(needs, _priorities(graph, todo), one, max_live=work.desk.limits.max_live)


async def sequential(work: Work) -> None:
    """Every agent reads everything before it."""
    done: list[int] = []
    for i in work.graph.order:
        if work.todo([i]):
            await work.do([i], [(u, True) for u in done])
        done.append(i)


async def hybrid(work: Work) -> None:
    """Critical pairs are one agent; results flow along edges."""
    graph, strong = work.graph, COUPLING["strong"]
    groups = [left for g in groups_of(graph) if (left := work.todo(g))]
    group_of = {i: k for k, g in enumerate(groups) for i in g}

    async def one(k: int) -> None:
        seen: dict[int, bool] = {}
        for i in groups[k]:
            for u, c in graph.preds[i]:
                if group_of.get(u) != k:
                    seen[u] = seen.get(u, False) or c >= strong
        await work.do(groups[k], sorted(seen.items()))

    needs = {
        k: sorted({group_of[u] for i in g for u, _ in graph.preds[i] if group_of.get(u, k) != k})
        for k, g in enumerate(groups)
    }
    priority = {k: max(graph.remaining[i] for i in g) for k, g in enumerate(groups)}
    await run_ready(needs, priority, one, max_live=work.desk.limits.max_live)


async def hierarchical(work: Work) -> None:
    """A lead plans, workers work, the lead reviews."""
    graph, desk = work.graph, work.desk
    todo = work.todo(graph.order)
    left = set(todo)
    lead = await desk.ask(
        "lead", [], agent_text([work.text_of(i) for i in range(len(graph.nodes))], order=PLAN),
        tokens=desk.limits.call_tokens * max(1, len(graph.nodes) // 2),
    )
    plan = "" if lead.error else lead.text

    async def one(i: int) -> None:
        await work.do([i], [(u, True) for u, _ in sorted(graph.preds[i])], plan=plan, after=[lead.number])

    needs = {i: [u for u, _ in graph.preds[i] if u in left] for i in todo}
    await run_ready(needs, _priorities(graph, todo), one, max_live=desk.limits.max_live)
    await _review(work)


async def _review(work: Work) -> None:
    """The lead names the parts that must be done again; each of them is, once, knowing all other results."""
    graph, desk = work.graph, work.desk
    reports = [work.reports[n.id] for n in graph.nodes]
    answer = await desk.ask(
        "review", [], agent_text([], known=[r.full for r in reports], order=CHECK), tokens=desk.limits.call_tokens,
        after=sorted({r.call for r in reports}),
    )
    found = re.match(rf"\s*{AGAIN}(.+)", answer.text)
    if answer.error or not found:
        return
    named = {w.strip(" .") for w in found.group(1).split(",")}
    for i in graph.order:  # one after the other: a later one must know what an earlier one changed
        id = graph.nodes[i].id
        if id in named:
            old = work.reports[id].value
            await correct(work, i, [old or MISSING], after=[answer.number])
            if work.reports[id].value != old:
                named |= {graph.nodes[v].id for v, _ in graph.succs[i]}


async def correct(
    work: Work, i: int, values: Sequence[str], *, after: Sequence[int] = (), role: str = "correction",
) -> None:
    """Ask sub-task ``i`` again, with what was said of it and every other result."""
    id = work.graph.nodes[i].id
    others = [(j, False) for j in range(len(work.graph.nodes)) if j != i and work.graph.nodes[j].id in work.reports]
    old = work.reports.get(id)
    await work.do([i], others, said=[f"{id} = {v}" for v in values], after=after, role=role)
    if old is not None and work.reports[id].failed:
        work.reports[id] = old


def groups_of(graph: TaskGraph) -> list[list[int]]:
    """Nodes that one agent of ``hybrid`` does: joined by critical edges, and whatever lies on a way back between them.

    In topological order, within a group too. Linear."""
    parent = list(range(len(graph.nodes)))

    def top(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for u, near in enumerate(graph.succs):
        for v, c in near:
            if c >= COUPLING["critical"]:
                parent[top(v)] = top(u)
    label = _components([top(i) for i in range(len(parent))], graph)
    groups: dict[int, list[int]] = {}
    for i in graph.order:
        groups.setdefault(label[i], []).append(i)
    return list(groups.values())


def _components(label: list[int], graph: TaskGraph) -> list[int]:
    """Strongly connected components of the graph of labels (Tarjan, without recursion)."""
    after: dict[int, list[int]] = {x: [] for x in label}
    for u, near in enumerate(graph.succs):
        after[label[u]] += [label[v] for v, _ in near if label[v] != label[u]]
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    found: dict[int, int] = {}
    stack: list[int] = []
    for root in after:
        walk = [(root, iter(after[root]))] if root not in number else []
        if walk:
            number[root] = low[root] = len(number)
            stack.append(root)
        while walk:
            x, rest = walk[-1]
            for y in rest:
                if y not in number:
                    number[y] = low[y] = len(number)
                    stack.append(y)
                    walk.append((y, iter(after[y])))
                    break
                if y not in found:
                    low[x] = min(low[x], number[y])
            else:
                walk.pop()
                if walk:
                    low[walk[-1][0]] = min(low[walk[-1][0]], low[x])
                while low[x] == number[x] and x not in found:
                    found[stack.pop()] = x
    return [found[x] for x in label]


def _priorities(graph: TaskGraph, todo: Sequence[int]) -> dict[int, float]:
    return {i: graph.remaining[i] for i in todo}


PROGRAMS = {"parallel": parallel, "sequential": sequential, "hybrid": hybrid, "hierarchical": hierarchical}


def program_of(name: str):
    """The program of a topology. Raises InputError for none."""
    if name not in PROGRAMS:
        raise InputError(f"topology {name!r} has no program: there are {', '.join(PROGRAMS)}")
    return PROGRAMS[name]
