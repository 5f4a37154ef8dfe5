"""What AdaptOrch claims, measured: static topologies and ``auto`` on generated tasks with known graphs.

Every arm is given the same tasks, graphs, agents, prompts and checks. A static arm runs its topology once; ``auto``
is the router with re-routing; two more arms take it apart: the router alone, and re-routing from parallel on without
a router.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stretto.engine.params import SamplingParams
from stretto.llm import LLM
from stretto.models import checkpoint
from stretto.threads.measure_calls import right_calls
from stretto.threads.orchestrate import Options, Orchestration, aorchestrate, call_bound, orchestrate
from stretto.threads.routing import Router
from stretto.threads.synthesis import Candidate, Verdict, arithmetic
from stretto.threads.task_graph import Edge, SubTask, TaskGraph
from stretto.training.agent_data import cases
from stretto.zoo.models import resolve
from stretto.zoo.pages.orchestra import KINDS, TaskCase, valid

__all__ = ["MODEL", "anova", "measure", "rules", "task_of"]

MODEL = "zoo:tiny-agents"
SEED = 17
STATIC = ("parallel", "hybrid", "hierarchical", "sequential")
ARMS: Mapping[str, tuple[str, Options]] = {
    **{way: (way, Options(escalate=False)) for way in ("single", *STATIC)},
    "parallel, nothing passed on": ("parallel", Options(escalate=False, blind=True)),
    "auto": ("auto", Options()),
    "auto, router alone": ("auto", Options(escalate=False)),
    "no router, re-routing": ("parallel", Options()),
}
Run = tuple[TaskCase, Orchestration, bool]  # (task, result, right)


def task_of(case: TaskCase) -> TaskGraph:
    """The known graph of a generated task."""
    return TaskGraph(
        [SubTask(s.id, s.text) for s in case.subs], [Edge(*e) for e in case.edges], common=case.common,
        merge=case.merge.text if case.merge else None,
        outputs=[s.id for s in case.subs] if case.kind == "dense" else None,
    )


def rules(case: TaskCase) -> Callable[[Candidate], Verdict]:
    """A validator that reads the task and never its solution: arithmetic, and for colours the rules they must keep."""
    options = {s.id: s.op[1] for s in case.subs if s.op[0] == "take"}

    def check(candidate: Candidate) -> Verdict:
        found = arithmetic(candidate)
        if not options:
            return found
        taken: dict[str, str] = {}
        bad = set(found.faulty)
        for id, allowed in options.items():
            value = candidate.values.get(id, "")
            if value not in allowed or value in taken:
                bad |= {id}
            taken.setdefault(value, id)
        if not bad:
            return Verdict(True, score=1.0)
        return Verdict(False, frozenset(bad), f"rules broken by {', '.join(sorted(bad))}", 1 - len(bad) / len(options))

    return check


def measure(llm: Any, quick: bool) -> dict[str, Any]:
    """Everything the claims need; see ``systems/adaptorch.py``. ``llm``: MODEL."""
    n, timed, planned = (5, 1, 5) if quick else (40, 3, 20)
    tasks = {kind: cases("test", kind, n, SEED) for kind in KINDS}
    orchestrate(task_of(tasks["wide"][0]), agents=llm)  # kernels
    runs = {arm: [r for kind in KINDS for r in _all(llm, tasks[kind], arm)] for arm in ARMS}
    seconds = _timed(llm, {kind: found[:timed] for kind, found in tasks.items()})
    return {
        "arms": {arm: _summary(found, seconds[arm]) for arm, found in runs.items()},
        "gain": _gain(runs), "calls told only what is right": right_calls(llm, 2 if quick else 12, SEED),
        "routing": _routing(1 if quick else 3),
        "ends": _ends(llm, tasks, 1 if quick else 4), "one step": _one_step(llm, 20 if quick else 100),
        "model's own graphs": _planned(llm, {kind: found[:planned] for kind, found in tasks.items()}, runs["auto"]),
        **({} if quick else {"variance": spread(llm, 10)}),
        "tasks": n, "timed": timed, "seed": SEED, "model": MODEL,
    }


def _all(llm: Any, found: Sequence[TaskCase], arm: str, at_once: int = 20) -> list[Run]:
    """``found`` by one arm, several at the same time: what they answer, not how long it takes."""
    way, options = ARMS[arm]

    async def some(part: Sequence[TaskCase]) -> list[Orchestration]:
        return await asyncio.gather(*(
            aorchestrate(task_of(c), way, agents=llm, validator=rules(c), options=options) for c in part
        ))

    out: list[Run] = []
    for i in range(0, len(found), at_once):
        part = found[i : i + at_once]
        out += [(c, o, valid(c, o.values)) for c, o in zip(part, asyncio.run(some(part)), strict=True)]
    return out


def _timed(llm: Any, tasks: Mapping[str, Sequence[TaskCase]]) -> dict[str, dict[str, list[float]]]:
    """Seconds of every arm on tasks one by one, the arms in turns: arm -> kind -> seconds."""
    out: dict[str, dict[str, list[float]]] = {arm: {kind: [] for kind in tasks} for arm in ARMS}
    for kind, found in tasks.items():
        for k, case in enumerate(found):
            order = list(ARMS)[k % len(ARMS) :] + list(ARMS)[: k % len(ARMS)]
            for arm in order:
                way, options = ARMS[arm]
                result = orchestrate(task_of(case), way, agents=llm, validator=rules(case), options=options)
                out[arm][kind].append(result.seconds)
    return out


def _summary(found: Sequence[Run], seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for kind in KINDS:
        runs = [(o, right) for c, o, right in found if c.kind == kind]
        mean = lambda value, runs=runs: round(statistics.mean(value(o) for o, _ in runs), 3)
        ways = [o.topologies[0] for o, _ in runs]
        rows[kind] = {
            "exact": round(statistics.mean(right for _, right in runs), 4), "calls": mean(lambda o: o.calls),
            "tokens": mean(lambda o: o.tokens), "path_tokens": mean(lambda o: o.critical_path_tokens),
            "rounds": mean(lambda o: len(o.topologies)), "flagged": mean(lambda o: not o.ok),
            "consistency": mean(lambda o: o.consistency),
            "seconds": round(statistics.median(seconds[kind]), 4), "seconds_low": round(min(seconds[kind]), 4),
            "seconds_high": round(max(seconds[kind]), 4), "first": {w: ways.count(w) for w in sorted(set(ways))},
        }
    rows["mean"] = {
        key: round(statistics.mean(rows[kind][key] for kind in KINDS), 4)
        for key in ("exact", "calls", "tokens", "path_tokens", "seconds")
    }
    return rows


def _gain(runs: Mapping[str, Sequence[Run]], draws: int = 1000) -> dict[str, Any]:
    """auto minus each static topology in the mean over kinds, with the 95 % interval over tasks (paired bootstrap)."""
    rng, out = random.Random(SEED), {}
    right = {arm: {k: [r for c, _, r in found if c.kind == k] for k in KINDS} for arm, found in runs.items()}
    for arm in [a for a in runs if a != "auto"]:
        diffs = {k: [int(a) - int(b) for a, b in zip(right["auto"][k], right[arm][k], strict=True)] for k in KINDS}
        means = sorted(
            statistics.fmean(statistics.fmean(rng.choices(d, k=len(d))) for d in diffs.values()) for _ in range(draws)
        )
        out[arm] = {
            "gain": round(statistics.fmean(statistics.fmean(d) for d in diffs.values()), 4),
            "low": round(means[int(0.025 * draws)], 4), "high": round(means[int(0.975 * draws)], 4),
        }
    return out


def _routing(turns: int) -> dict[str, float]:
    """Seconds to measure and route graphs of 10^5 nodes and 3 x 10^5 edges, and of a quarter of it."""
    out: dict[str, float] = {}
    for name, n in (("quarter", 25_000), ("whole", 100_000)):
        rng, pairs = random.Random(SEED), set()
        while len(pairs) < 3 * n:
            u, v = rng.randrange(n), rng.randrange(n)
            if u < v:
                pairs.add((u, v))
        nodes, edges = [SubTask(str(i), "") for i in range(n)], [Edge(str(u), str(v), 0.3) for u, v in pairs]
        times = []
        for _ in range(turns):
            start = time.perf_counter()
            graph = TaskGraph(nodes, edges)
            built = time.perf_counter()
            Router().route(graph)
            times.append((built - start, time.perf_counter() - built))
        out[f"{name}: check and sort"], out[f"{name}: measure and route"] = (min(t) for t in zip(*times, strict=True))
    small = TaskGraph([SubTask(str(i), "") for i in range(8)], [Edge(str(i), str(i + 1)) for i in range(7)])
    start = time.perf_counter()
    for _ in range(200):
        Router().route(TaskGraph(small.nodes, small.edges))
    return out | {"a task of eight": (time.perf_counter() - start) / 200}


def _ends(llm: Any, tasks: Mapping[str, Sequence[TaskCase]], n: int) -> dict[str, Any]:
    """A validator that always fails, on every kind."""
    never = lambda candidate: Verdict(False, frozenset(), "never")
    worst = {"rounds": 0, "calls": 0, "share of the bound": 0.0}
    for found in tasks.values():
        for case in found[:n]:
            out = orchestrate(task_of(case), "parallel", agents=llm, validator=never)
            worst["rounds"] = max(worst["rounds"], len(out.topologies))
            worst["calls"] = max(worst["calls"], out.calls)
            worst["share of the bound"] = max(worst["share of the bound"], out.calls / call_bound(len(case.subs)))
    return worst


def _one_step(llm: Any, n: int) -> dict[str, float]:
    """orchestrate on a task of one step against the plain call, in turns."""
    leaves = [(c.common, c.subs[0]) for c in cases("test", "wide", n, SEED + 1)]
    times: dict[str, list[float]] = {"orchestrate": [], "plain": []}
    params = SamplingParams(max_tokens=160, temperature=0.0)
    for k, (common, sub) in enumerate(leaves):
        graph = TaskGraph([SubTask(sub.id, f"{sub.id}: {sub.text}")], common=common)
        text = f"{common}\n{sub.id}: {sub.text}"
        for name in sorted(times, reverse=bool(k % 2)):
            start = time.perf_counter()
            if name == "plain":
                llm.generate(llm.chat_prompt([{"role": "user", "content": text}]), params)
            else:
                orchestrate(graph, agents=llm)
            times[name].append(time.perf_counter() - start)
    plain, ours = statistics.median(times["plain"]), statistics.median(times["orchestrate"])
    return {"plain": plain, "orchestrate": ours, "ratio": ours / plain}


def _planned(llm: Any, tasks: Mapping[str, Sequence[TaskCase]], known: Sequence[Run]) -> dict[str, Any]:
    """The model writes the graph itself, from the task's text alone."""

    async def some(part: Sequence[TaskCase]) -> list[Orchestration]:
        return await asyncio.gather(*(aorchestrate(c.text, agents=llm, validator=rules(c)) for c in part))

    out = {}
    for kind, found in tasks.items():
        runs = asyncio.run(some(found))
        same = [o.graph is not None and _shape(o.graph) == _shape(task_of(c)) for c, o in zip(found, runs, strict=True)]
        out[kind] = {
            "graph right": statistics.mean(same),
            "exact": statistics.mean(valid(c, o.values) for c, o in zip(found, runs, strict=True)),
            "exact with the graph given": statistics.mean(right for c, _, right in known if c in found),
        }
    return out


def _shape(graph: TaskGraph) -> tuple[Any, ...]:
    return {n.id for n in graph.nodes}, {(e.source, e.target, e.coupling) for e in graph.edges}, graph.merge


def relatives(folder: Path, out: Path, n: int, noise: float, seed: int) -> list[Path]:
    """``n`` models near the one in ``folder``, in folders of ``out``: noise of ``noise`` times each matrix's own spread
    on its weights."""
    made = []
    for k in range(n):
        model = checkpoint.load(folder, dtype="float32")
        generator = torch.Generator().manual_seed(seed + k)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p += noise * p.std() * torch.randn(p.shape, generator=generator)
            checkpoint.save(model, out / str(k), dtype=torch.bfloat16)
        shutil.copytree(folder, out / str(k), dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        made.append(out / str(k))
    return made


def spread(llm: Any, n: int) -> dict[str, float]:
    """``anova`` over MODEL and two relatives of it."""
    with tempfile.TemporaryDirectory() as out:  # a tokenizer reads its chat template when it is first used
        near = relatives(resolve(llm.model_name), Path(out), 2, 0.03, SEED)
        return anova({"itself": llm} | {p.name: LLM(p) for p in near}, n)


def anova(models: Mapping[str, Any], n: int) -> dict[str, float]:
    """Two-way analysis of variance of exact match over model x topology, one value per cell: mean squares of both.

    The card's diagnostic: among models of about the same ability, does the topology matter more than the model?
    """
    found = {
        (m, way): statistics.mean(r for kind in KINDS for *_, r in _all(llm, cases("test", kind, n, SEED), way))
        for m, llm in models.items() for way in STATIC
    }
    grand = statistics.mean(found.values())
    rows = {m: statistics.mean(found[m, w] for w in STATIC) for m in models}
    columns = {w: statistics.mean(found[m, w] for m in models) for w in STATIC}
    rest = sum((x - rows[m] - columns[w] + grand) ** 2 for (m, w), x in found.items())
    return {
        "models": len(models), "tasks of a kind": n, "band": max(rows.values()) - min(rows.values()),
        "mean square of models": len(STATIC) * sum((x - grand) ** 2 for x in rows.values()) / (len(models) - 1),
        "mean square of topologies": len(models) * sum((x - grand) ** 2 for x in columns.values()) / (len(STATIC) - 1),
        "mean square of the rest": rest / ((len(models) - 1) * (len(STATIC) - 1)),
    }

