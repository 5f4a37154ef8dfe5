"""A task as a graph: sub-tasks, what needs what, and how much of it (AdaptOrch, 2026, "build the DAG").

Nodes carry an instruction and w, the tokens that are expected of it; an edge u -> v carries the coupling c in [0, 1],
how much of u's content v needs. Everything here is linear in |V| + |E|. Indices of nodes are those of the input.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stretto.errors import InputError, OptionError

__all__ = ["COUPLING", "Edge", "Measures", "SubTask", "TaskGraph"]

COUPLING = {"none": 0.0, "weak": 0.3, "strong": 0.7, "critical": 1.0}
TOKENS = 32.0  # w where a plan says nothing


@dataclass(frozen=True, slots=True)
class SubTask:
    """``w``: expected tokens of its answer."""

    id: str
    instruction: str
    w: float = TOKENS


@dataclass(frozen=True, slots=True)
class Edge:
    """``target`` needs what ``source`` says; ``coupling`` in [0, 1], or a key of COUPLING."""

    source: str
    target: str
    coupling: float = COUPLING["strong"]


@dataclass(frozen=True, slots=True)
class Measures:
    """``nodes`` |V|, ``edges`` |E|; ``omega``: the largest layer by longest path, a lower bound
    of the largest antichain; ``delta``: the longest path by w in tokens, ``depth``: in nodes; ``gamma``: the mean
    coupling."""

    nodes: int
    edges: int
    omega: int
    delta: float
    depth: int
    gamma: float

    @property
    def r(self) -> float:
        return self.omega / self.nodes


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    id: str = Field(min_length=1, max_length=64)
    instruction: str | None = None
    w: float = Field(TOKENS, gt=0, alias="tokens")


class _Edge(BaseModel):
    model_config = ConfigDict(extra="forbid")
    source: str
    target: str
    coupling: float | str = "strong"


class _Plan(BaseModel):
    model_config = ConfigDict(extra="forbid")
    common: str = ""
    subtasks: list[_Node]
    edges: list[_Edge | tuple[str, str] | tuple[str, str, float | str]] = []
    merge: str | None = None
    outputs: list[str] | None = None


class TaskGraph:
    """A directed acyclic graph of sub-tasks.

    ``common``: what every agent reads first. ``merge``: what the synthesis has to do with all results; None = the
    results of ``outputs`` (default: the sinks) are the answer as they are. Raises InputError for no sub-task at all, a
    duplicate id, an edge to itself, twice, or to an id that does not exist, and a cycle, all by name.
    """

    def __init__(
        self, nodes: Iterable[SubTask], edges: Iterable[Edge] = (), *, common: str = "", merge: str | None = None,
        outputs: Iterable[str] | None = None,
    ):
        self.nodes, self.edges, self.common, self.merge = tuple(nodes), tuple(edges), common, merge
        self.index: dict[str, int] = {}
        if not self.nodes:
            raise InputError("a task needs at least one sub-task")
        for i, node in enumerate(self.nodes):
            if self.index.setdefault(node.id, i) != i:
                raise InputError(f"two sub-tasks have the id {node.id!r}: ids must differ")
        self._link()
        self.order = self._sort()
        if outputs is not None:
            self.outputs = tuple(outputs)
            if lost := [o for o in self.outputs if o not in self.index]:
                raise InputError(f"outputs names {lost[0]!r}, which is no sub-task: there are {', '.join(self.index)}")
        else:
            self.outputs = tuple(n.id for n, after in zip(self.nodes, self.succs, strict=True) if not after)

    def _link(self) -> None:
        n, index, seen = len(self.nodes), self.index, set()
        self.succs: list[list[tuple[int, float]]] = [[] for _ in range(n)]
        self.preds: list[list[tuple[int, float]]] = [[] for _ in range(n)]
        for e in self.edges:
            u, v, c = index.get(e.source), index.get(e.target), e.coupling
            if u is None or v is None:
                lost = e.source if u is None else e.target
                raise InputError(f"the edge {e.source!r} -> {e.target!r} names {lost!r}, which is no sub-task")
            if u == v:
                raise InputError(f"sub-task {e.source!r} depends on itself")
            if not 0 <= c <= 1:
                raise OptionError("coupling", c, f"a number from 0 to 1 (edge {e.source!r} -> {e.target!r})")
            if u * n + v in seen:
                raise InputError(f"the edge {e.source!r} -> {e.target!r} is there twice")
            seen.add(u * n + v)
            self.succs[u].append((v, c))
            self.preds[v].append((u, c))

    def _sort(self) -> list[int]:
        """Topological order: by level, in a level as in the input, whatever the order of the edges. Sets ``level``."""
        missing = [len(p) for p in self.preds]
        ready = deque(i for i, m in enumerate(missing) if not m)
        self.level = [0] * len(missing)  # of each node the longest path that leads to it, in edges
        found = 0
        while ready:
            u = ready.popleft()
            found, above = found + 1, self.level[u] + 1
            for v, _ in self.succs[u]:
                missing[v] -= 1
                self.level[v] = max(self.level[v], above)
                if not missing[v]:
                    ready.append(v)
        if found < len(missing):
            raise InputError(f"the sub-tasks depend on each other in a circle: {' -> '.join(self._cycle(missing))}")
        layers: list[list[int]] = [[] for _ in range(1 + max(self.level))]
        for i, depth in enumerate(self.level):
            layers[depth].append(i)
        self.width = [len(layer) for layer in layers]
        return [i for layer in layers for i in layer]

    def _cycle(self, missing: list[int]) -> list[str]:
        """Ids along one cycle of the nodes that never became ready; each of them has such a predecessor."""
        at = next(i for i, m in enumerate(missing) if m)
        seen: dict[int, int] = {}
        path: list[int] = []
        while at not in seen:
            seen[at] = len(path)
            path.append(at)
            at = next(u for u, _ in self.preds[at] if missing[u])
        return [self.nodes[i].id for i in [at, *reversed(path[seen[at]:])]]

    @cached_property
    def remaining(self) -> list[float]:
        """Of each node the longest path from it to a sink by w, itself included: its priority."""
        out = [n.w for n in self.nodes]
        for u in reversed(self.order):
            out[u] += max((out[v] for v, _ in self.succs[u]), default=0.0)
        return out

    @cached_property
    def measures(self) -> Measures:
        couplings = [e.coupling for e in self.edges]
        return Measures(
            len(self.nodes), len(couplings), max(self.width), max(self.remaining), len(self.width),
            sum(couplings) / len(couplings) if couplings else 0.0,
        )

    def descendants(self, ids: Iterable[str]) -> set[str]:
        """``ids`` and everything that needs any of them."""
        todo = [self.index[i] for i in ids]
        seen = set(todo)
        while todo:
            for v, _ in self.succs[todo.pop()]:
                if v not in seen:
                    seen.add(v)
                    todo.append(v)
        return {self.nodes[i].id for i in seen}

    def dump(self) -> dict[str, Any]:
        """As JSON can say it; ``TaskGraph.read`` makes the same graph of it."""
        return {
            "common": self.common, "merge": self.merge, "outputs": list(self.outputs),
            "subtasks": [{"id": n.id, "instruction": n.instruction, "w": n.w} for n in self.nodes],
            "edges": [[e.source, e.target, e.coupling] for e in self.edges],
        }

    @classmethod
    def read(cls, plan: str | Mapping[str, Any], *, lines: Mapping[str, str] | None = None) -> TaskGraph:
        """From JSON: {"common", "subtasks": [{"id", "instruction", "w"}], "edges": [[u, v, coupling]], "merge"}.

        Short form: {id: [[source, coupling], ...]}, what each sub-task needs. ``lines``: instructions of the ids for
        which the plan has none. Raises InputError naming the field.
        """
        try:
            given = json.loads(plan) if isinstance(plan, str) else plan
            body = _Plan.model_validate(_spelled_out(given))
        except ValidationError as e:
            first = e.errors()[0]
            raise InputError(f"the plan's {'.'.join(map(str, first['loc'])) or 'top'} is wrong: {first['msg']}") from e
        except ValueError as e:
            raise InputError(f"the plan is no JSON: {e}") from e
        nodes = []
        for n in body.subtasks:
            text = n.instruction if n.instruction is not None else (lines or {}).get(n.id)
            if text is None:
                raise InputError(f"sub-task {n.id!r} has no instruction, and the task has no line {n.id!r}:")
            nodes.append(SubTask(n.id, text, n.w))
        edges = [_edge(e) for e in body.edges]
        return cls(nodes, edges, common=body.common, merge=body.merge, outputs=body.outputs)


def _spelled_out(given: Any) -> Any:
    """The long form of a plan in the short one."""
    if not isinstance(given, dict) or not given or "subtasks" in given:
        return given
    if not all(isinstance(us, list) and all(isinstance(u, list) and u for u in us) for us in given.values()):
        return given
    edges = [[u[0], v, *u[1:]] for v, us in given.items() for u in us]
    return {"subtasks": [{"id": i} for i in given], "edges": edges}


def _edge(given: _Edge | tuple) -> Edge:
    u, v, c = (given.source, given.target, given.coupling) if isinstance(given, _Edge) else (*given, "strong")[:3]
    if isinstance(c, str):
        if c not in COUPLING:
            raise OptionError("coupling", c, f"a number from 0 to 1 or one of {', '.join(COUPLING)}")
        c = COUPLING[c]
    return Edge(u, v, float(c))
