"""Which topology fits a task graph (AdaptOrch, 2026): a pure function of its measures, in linear time.

First match wins: one node -> single; no edges -> parallel; omega = 1 -> sequential; gamma > theta_gamma and more nodes
than theta_delta -> hierarchical; r > theta_omega and gamma <= theta_gamma -> parallel; else hybrid. Priors of a domain
are added to the thresholds; they are learned from logged outcomes, and there are none before.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stretto.errors import OptionError
from stretto.threads.task_graph import Measures, TaskGraph

__all__ = ["ESCALATION", "TOPOLOGIES", "Bias", "Outcome", "Router", "Thresholds", "learn_priors"]

TOPOLOGIES = ("single", "parallel", "hybrid", "hierarchical", "sequential")
ESCALATION = ("parallel", "hybrid", "hierarchical", "sequential")  # each later one is safer


@dataclass(frozen=True, slots=True)
class Thresholds:
    """``theta_omega``: of r = omega / |V|; ``theta_gamma``: of the mean coupling; ``theta_delta``: of |V|."""

    theta_omega: float = 0.5
    theta_gamma: float = 0.6
    theta_delta: float = 5.0

    def __post_init__(self) -> None:
        for name in ("theta_omega", "theta_gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(name, getattr(self, name), "a number from 0 to 1")
        if self.theta_delta < 0:
            raise OptionError("theta_delta", self.theta_delta, "a number of nodes from 0")


@dataclass(frozen=True, slots=True)
class Bias:
    """What a domain adds to the thresholds."""

    omega: float = 0.0
    gamma: float = 0.0
    delta: float = 0.0


@dataclass(frozen=True, slots=True)
class Router:
    """``priors``: domain -> Bias."""

    thresholds: Thresholds = Thresholds()
    priors: Mapping[str, Bias] | None = None

    def route(self, graph: TaskGraph | Measures, domain: str = "") -> str:
        """The topology for a graph."""
        return self.explain(graph, domain)[0]

    def explain(self, graph: TaskGraph | Measures, domain: str = "") -> tuple[str, str]:
        """(topology, the rule that chose it)"""
        m = graph if isinstance(graph, Measures) else graph.measures
        t, b = self.thresholds, (self.priors or {}).get(domain, Bias())
        omega, gamma, delta = t.theta_omega + b.omega, t.theta_gamma + b.gamma, t.theta_delta + b.delta
        if m.nodes == 1:
            return "single", "one sub-task"
        if not m.edges:
            return "parallel", "no dependencies"
        if m.omega == 1:
            return "sequential", "a chain: omega = 1"
        if m.gamma > gamma and m.nodes > delta:
            return "hierarchical", f"gamma = {m.gamma:.2f} > {gamma:.2f} and |V| = {m.nodes} > {delta:g}"
        if m.r > omega and m.gamma <= gamma:
            return "parallel", f"r = {m.r:.2f} > {omega:.2f} and gamma = {m.gamma:.2f} <= {gamma:.2f}"
        return "hybrid", f"r = {m.r:.2f}, gamma = {m.gamma:.2f}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A logged run. ``task``: the same for runs of the same task in several topologies; ``score``: higher is better."""

    domain: str
    task: str
    measures: Measures
    topology: str
    score: float


_GRID = ((-0.3, -0.15, 0.0, 0.15, 0.3), (-0.4, -0.2, 0.0, 0.2, 0.4), (-3.0, 0.0, 3.0))


def learn_priors(
    outcomes: Iterable[Outcome], thresholds: Thresholds | None = None, *, margin: float = 0.01, least: int = 8,
) -> dict[str, Bias]:
    """Per domain the additive biases whose routing had the best mean logged score.

    Only tasks that were run in several topologies say anything. A domain with fewer than ``least`` of them, or whose
    best bias gains less than ``margin`` over none, gets no prior. A choice that was not logged counts as the task's
    mean.
    """
    logs: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    measures: dict[tuple[str, str], Measures] = {}
    for o in outcomes:
        logs[o.domain][o.task][o.topology].append(o.score)
        measures[o.domain, o.task] = o.measures
    biases = sorted((Bias(*b) for b in itertools.product(*_GRID)), key=_size)
    priors = {}
    for domain, tasks in logs.items():
        means = {t: {k: sum(v) / len(v) for k, v in by.items()} for t, by in tasks.items() if len(by) > 1}
        if len(means) < least:
            continue

        def value(bias: Bias, domain: str = domain, means: dict[str, dict[str, float]] = means) -> float:
            router = Router(thresholds or Thresholds(), {domain: bias})
            total = 0.0
            for task, by in means.items():
                total += by.get(router.route(measures[domain, task], domain), sum(by.values()) / len(by))
            return total / len(means)

        best = max(biases, key=value)  # the first of equals is the smallest
        if value(best) >= value(Bias()) + margin:
            priors[domain] = best
    return priors


def _size(b: Bias) -> float:
    return abs(b.omega) + abs(b.gamma) + abs(b.delta) / 10
