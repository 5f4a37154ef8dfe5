"""``orchestrate``: one task, several agents (AdaptOrch, 2026): decompose, route, execute, synthesize, and re-route.

A task that is one step costs one plain call. Otherwise the task graph chooses the topology; when the result does not
pass its validator, the next safer topology of parallel -> hybrid -> hierarchical -> sequential does again what was at
fault. Each topology runs at most once, so it ends: see ``call_bound``.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stretto.errors import CapacityError, InputError, OptionError
from stretto.threads.agents import EngineAgent, agents_of
from stretto.threads.desk import Call, Desk, Limits
from stretto.threads.routing import ESCALATION, TOPOLOGIES, Router
from stretto.threads.synthesis import Candidate, Verdict, arithmetic, conflicts, consistency, merge, merged_id, settle
from stretto.threads.task_graph import SubTask, TaskGraph
from stretto.threads.topologies import PROGRAMS, Report, Work
from stretto.zoo.pages.orchestra import SPLIT, agent_text, claims

__all__ = ["Estimate", "Options", "Orchestration", "aorchestrate", "call_bound", "decompose", "estimate", "orchestrate"]

Task = str | TaskGraph | Mapping[str, Any]
Validator = Callable[[Candidate], Verdict | bool]
_LINE = re.compile(r"(?m)^[ \t]*(\w[\w.-]{0,63}):[ \t]+(\S.*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """``theta_cs``: consistency from which results are merged without a judge; ``lam``: weight of embeddings in it;
    ``escalate``: re-route when the validator says no; ``decompose``: "auto" = ask for a plan when the task has several
    lines, "always", "never"; ``blind``: parallel passes nothing on (the paper's plain form); ``limits``: see Limits."""

    theta_cs: float = 0.7
    lam: float = 0.35
    escalate: bool = True
    decompose: Literal["auto", "always", "never"] = "auto"
    blind: bool = False
    router: Router = field(default_factory=Router)
    domain: str = ""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("theta_cs", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(name, getattr(self, name), "a number from 0 to 1")
        if self.decompose not in ("auto", "always", "never"):
            raise OptionError("decompose", self.decompose, "auto, always or never")


@dataclass(slots=True)
class Orchestration:
    """The result. ``ok``: it passed its validator; ``topologies``: what ran, in order; ``rule``: why the first;
    ``consistency``: of the answer that is returned; ``calls`` count every try; ``evaluated``: tokens that the engine
    computed, None where endpoints were asked; ``critical_path_tokens``, ``critical_path_seconds``: along calls that
    waited for one another; ``notes``: what went wrong or was cut."""

    answer: str
    values: dict[str, str]
    ok: bool
    topologies: list[str]
    rule: str
    consistency: float
    calls: int
    tokens: int
    seconds: float
    evaluated: int | None = None
    critical_path_tokens: float = 0
    critical_path_seconds: float = 0.0
    trace: list[Call] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    graph: TaskGraph | None = None

    @property
    def topology(self) -> str:
        """The one whose result is returned last in the escalation."""
        return self.topologies[-1]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an orchestration is expected to cost, without asking anybody: one round, and at most."""

    topology: str
    rule: str
    calls: int
    most_calls: int
    tokens: float
    path_tokens: float


def call_bound(nodes: int, *, rounds: int = len(ESCALATION), retries: int = 1) -> int:
    """The most calls, tries included: in each round every sub-task and one correction of it, and a lead, a review, a
    judge and a synthesis; one call more for the plan, and one to repair it."""
    return (rounds * (2 * nodes + 4) + 2) * (1 + retries)


def orchestrate(
    task: Task, topology: str = "auto", *, agents: Any, validator: Validator | None = None,
    options: Options | None = None,
) -> Orchestration:
    """Answer ``task``: a text, a TaskGraph, or its JSON.

    ``topology``: "auto", or one of single, parallel, hybrid, hierarchical, sequential. ``agents``: an LLM, an Endpoint,
    or a list that takes turns. ``validator``: judges a Candidate, with a Verdict or a bool (default: ``arithmetic``).
    Never raises for agents that fail: the result is flagged (``ok``, ``notes``). Raises InputError for a task or
    topology that cannot be.
    """
    options, graph = _prepare(task, topology, options or Options())
    if graph is not None and _single(graph, topology):
        if (alone := _alone(agents)) is not None:
            return _plain_call(graph, topology, alone, options)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise InputError("an event loop is running here: await aorchestrate(...) instead of orchestrate(...)")
    return asyncio.run(_orchestrate(task, graph, topology, agents, validator, options))


async def aorchestrate(
    task: Task, topology: str = "auto", *, agents: Any, validator: Validator | None = None,
    options: Options | None = None,
) -> Orchestration:
    """``orchestrate`` for asyncio: several at once share an engine's forwards."""
    options, graph = _prepare(task, topology, options or Options())
    return await _orchestrate(task, graph, topology, agents, validator, options)


def _prepare(task: Any, topology: str, options: Options) -> tuple[Options, TaskGraph | None]:
    """The graph, where it need not be asked for."""
    if topology != "auto" and topology not in TOPOLOGIES:
        raise OptionError("topology", topology, f"auto, {', '.join(TOPOLOGIES)}")
    graph: TaskGraph | None = None
    if isinstance(task, TaskGraph):
        graph = task
    elif isinstance(task, str):
        if not task.strip():
            raise InputError("the task is empty")
        several = len([line for line in task.splitlines() if line.strip()]) > 1
        if options.decompose == "never" or (options.decompose == "auto" and not several):
            graph = TaskGraph([SubTask("task", task)])
    else:
        graph = TaskGraph.read(task)
    if graph is not None and len(graph.nodes) > options.limits.max_subtasks:
        raise InputError(f"{len(graph.nodes)} sub-tasks: max_subtasks={options.limits.max_subtasks}")
    return options, graph


def estimate(
    task: TaskGraph | Mapping[str, Any], topology: str = "auto", *, options: Options | None = None
) -> Estimate:
    """A dry run: the topology that would be used, and what it is expected to cost."""
    options, graph = _prepare(task, topology, options or Options())
    assert graph is not None
    chosen, rule = options.router.explain(graph, options.domain) if topology == "auto" else (topology, "asked for")
    n, total = len(graph.nodes), sum(node.w for node in graph.nodes)
    merging = int(graph.merge is not None)
    extra = 2 if chosen == "hierarchical" else 0
    path = {"sequential": total, "single": total}.get(chosen, graph.measures.delta)
    rounds = len(ESCALATION) - (ESCALATION.index(chosen) if chosen in ESCALATION else 0)
    return Estimate(
        chosen, rule, 1 if chosen == "single" else n + merging + extra,
        1 if chosen == "single" else call_bound(n, rounds=rounds if options.escalate else 1,
                                                retries=options.limits.retries),
        total, path,
    )


def _single(graph: TaskGraph, topology: str) -> bool:
    return topology == "single" or (topology == "auto" and len(graph.nodes) == 1)


def _single_text(graph: TaskGraph) -> str:
    """The whole task as one call."""
    if len(graph.nodes) == 1 and graph.merge is None:
        return graph.nodes[0].instruction
    pairs = [(n.id, n.instruction) for n in graph.nodes]
    return agent_text([*pairs, *([(merged_id(graph.index), graph.merge)] if graph.merge else [])])


def _alone(agents: Any) -> EngineAgent | None:
    found = agents_of(agents)
    return found[0] if len(found) == 1 and isinstance(found[0], EngineAgent) else None


def _plain_call(graph: TaskGraph, topology: str, agent: EngineAgent, options: Options) -> Orchestration:
    """One step on one engine: its ``generate``, and nothing else."""
    start, text = time.perf_counter(), _single_text(graph)
    if graph.common:
        text = f"{graph.common}\n{text}"
    ids = agent.llm.tokenizer.encode(agent.llm.chat_prompt([{"role": "user", "content": text}]))
    tokens = options.limits.call_tokens * len(graph.nodes) * (1 + (graph.merge is not None))
    params = agent.capped(max(1, min(tokens, agent.llm.max_model_len - len(ids))))
    out = agent.llm.generate([ids], params, method=agent.method, options=agent.options)[0].outputs[0]
    seconds = time.perf_counter() - start
    return Orchestration(
        out.text, _values(graph, out.text), out.finish_reason != "length", ["single"],
        "one sub-task" if topology == "auto" else "asked for", 1.0, 1, len(out.token_ids), seconds,
        out.metrics.rows, len(out.token_ids), seconds, graph=graph,
        notes=[] if out.finish_reason != "length" else ["the answer was cut: raise call_tokens"],
    )


def _values(graph: TaskGraph, text: str) -> dict[str, str]:
    found = claims(text)
    return {i: v for i, v in found.items() if i in graph.index or i == merged_id(graph.index)}


async def _orchestrate(
    task: Any, graph: TaskGraph | None, topology: str, agents: Any, validator: Validator | None, options: Options,
) -> Orchestration:
    crew = agents_of(agents)
    notes: list[str] = []
    desk = Desk(crew, options.limits)
    if graph is None:
        graph = await decompose(task, desk, notes)
    desk.common = graph.common
    try:
        for agent in crew:
            agent.open(graph.common)
        if _single(graph, topology):
            return await _one_call(graph, topology, desk, notes)
        chosen, rule = options.router.explain(graph, options.domain) if topology == "auto" else (topology, "asked for")
        return await _rounds(graph, chosen, rule, desk, validator or arithmetic, options, notes)
    finally:
        for agent in crew:
            agent.close()


async def decompose(task: str, desk: Desk, notes: list[str]) -> TaskGraph:
    """Ask for the task graph as JSON, once more if it cannot be read; then the task is one step, with a note.

    Lines "id: text" of the task are instructions that a plan may leave out; a line of such an id that the plan does
    not have is what the synthesis has to do; the lines before them are common to all agents.
    """
    lines = dict(_LINE.findall(task))
    first = _LINE.search(task)
    common = task[: first.start()].strip() if first and len(lines) > 1 else ""
    body = task[first.start():].strip() if first and common else task
    desk.common, said = common, ""
    for agent in desk.agents:
        agent.open(common)
    try:
        for _ in range(2):
            call = await desk.ask("plan", [], f" {body}\n {SPLIT}{said}", tokens=4 * desk.limits.call_tokens)
            try:
                return _planned(call.text, lines, common, desk.limits.max_subtasks)
            except InputError as e:
                said = f" Not: {str(e)[:200]}"
                notes.append(f"the plan could not be used: {e}")
    finally:
        for agent in desk.agents:
            agent.close()
    notes.append("no plan: the task is answered in one call")
    return TaskGraph([SubTask("task", body)], common=common)


def _planned(text: str, lines: Mapping[str, str], common: str, most: int) -> TaskGraph:
    start, end = text.find("{"), text.rfind("}")
    graph = TaskGraph.read(text[start : end + 1] if 0 <= start < end else text, lines=lines)
    if len(graph.nodes) > most:
        raise InputError(f"{len(graph.nodes)} sub-tasks: max_subtasks={most}")
    rest = [i for i in lines if i not in graph.index]
    merging = graph.merge or (lines[rest[0]] if len(rest) == 1 and lines else None)
    outputs = None if graph.edges and len(graph.outputs) == 1 else list(graph.index)
    return TaskGraph(graph.nodes, graph.edges, common=graph.common or common, merge=merging, outputs=outputs)


async def _one_call(graph: TaskGraph, topology: str, desk: Desk, notes: list[str]) -> Orchestration:
    tokens = desk.limits.call_tokens * len(graph.nodes) * (1 + (graph.merge is not None))
    call = await desk.ask("worker", [n.id for n in graph.nodes], _single_text(graph), tokens=tokens)
    if call.error:
        notes.append(f"the call failed: {call.error}")
    rule = "one sub-task" if topology == "auto" else "asked for"
    return _result(desk, Candidate(call.text, _values(graph, call.text), {}, 1.0), call.error is None, ["single"], rule,
                   graph, notes)


async def _rounds(
    graph: TaskGraph, chosen: str, rule: str, desk: Desk, validator: Validator, options: Options, notes: list[str],
) -> Orchestration:
    """Escalate from ``chosen`` on until a result passes."""
    ways = ESCALATION[ESCALATION.index(chosen):] if options.escalate else (chosen,)
    kept: dict[str, Report] = {}
    refused: dict[str, list[str]] = {}
    best: tuple[tuple[float, float], Candidate] | None = None
    ran: list[str] = []
    for way in ways:
        work = Work(graph, desk, dict(kept), options.blind, refused, notes)
        ran.append(way)
        try:
            candidate = await _round(work, way, options)
        except CapacityError as e:
            notes.append(f"stopped: {e}")
            if best is None:
                best = ((-1.0, 0.0), _partial(work))
            break
        verdict = _judge(validator, candidate)
        score = (verdict.score, candidate.consistency)
        if best is None or verdict.ok or score > best[0]:
            best = (score, candidate)
        if verdict.ok:
            return _result(desk, candidate, True, ran, rule, graph, notes)
        notes.append(f"{way}: {verdict.reason or 'the validator said no'}")
        kept = _keep(work, verdict)
        for id in sorted(verdict.faulty):
            value = candidate.values.get(id)
            if value is not None and value not in refused.setdefault(id, []):
                refused[id].append(value)
        desk.round += 1
    assert best is not None
    return _result(desk, best[1], False, ran, rule, graph, notes)


async def _round(work: Work, way: str, options: Options) -> Candidate:
    await PROGRAMS[way](work)
    embed = getattr(work.desk.agents[0], "embed", None)
    lam = options.lam if embed is not None else 0.0
    score = _score(work, lam, embed)
    disputed = conflicts(work.reports)
    if disputed and score < options.theta_cs:
        await settle(work, disputed)
        score = _score(work, lam, embed)
    return await merge(work, score, full=way in ("hierarchical", "sequential"))


def _score(work: Work, lam: float, embed: Any) -> float:
    return consistency(outputs=[r.text for r in work.reports.values() if not r.failed], lam=lam, embed=embed)


def _judge(validator: Validator, candidate: Candidate) -> Verdict:
    found = validator(candidate)
    return found if isinstance(found, Verdict) else Verdict(bool(found), score=float(found))


def _keep(work: Work, verdict: Verdict) -> dict[str, Report]:
    """Outputs that the next round may reuse: not at fault, not in conflict, not failed, and needing nothing that is."""
    bad = {i for i in verdict.faulty if i in work.graph.index}
    if not verdict.faulty:
        return {}
    bad |= set(conflicts(work.reports)) | {r.id for r in work.reports.values() if r.failed}
    bad = work.graph.descendants(bad & set(work.graph.index))
    return {i: r for i, r in work.reports.items() if i not in bad}


def _partial(work: Work) -> Candidate:
    reports = {r.id: r for r in work.reports.values()}
    values = {i: r.value for i, r in reports.items() if r.value is not None}
    return Candidate("\n".join(r.full for r in reports.values()), values, {i: r.text for i, r in reports.items()}, 0.0)


def _result(
    desk: Desk, candidate: Candidate, ok: bool, ran: Sequence[str], rule: str, graph: TaskGraph, notes: list[str],
) -> Orchestration:
    known = [c.evaluated for c in desk.trace]
    heads = sum(len(getattr(a, "head", ())) for a in desk.agents)
    return Orchestration(
        candidate.answer, dict(candidate.values), ok, list(ran), rule, candidate.consistency, desk.tries, desk.tokens,
        desk.now(), None if None in known else sum(k or 0 for k in known) + heads,
        desk.path(lambda c: c.completion_tokens), desk.path(lambda c: c.end - c.start), desk.trace,
        list(dict.fromkeys(notes)), graph,
    )

