"""Task graphs, routing, topologies, synthesis and the rounds of ``orchestrate``: what its card lists as exact."""

import asyncio
import itertools
import json
import random
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto import LLM, SamplingParams
from stretto.errors import EngineError, InputError, OptionError
from stretto.threads.agents import Endpoint, EngineAgent, Reply
from stretto.threads.desk import Limits, run_ready
from stretto.threads.orchestrate import Options, aorchestrate, call_bound, estimate, orchestrate
from stretto.threads.routing import Bias, Outcome, Router, Thresholds, learn_priors
from stretto.threads.synthesis import Candidate, Verdict, arithmetic, conflicts, consistency, similarity
from stretto.threads.task_graph import Edge, SubTask, TaskGraph
from stretto.threads.topologies import Report, groups_of
from stretto.zoo.pages import orchestra

QUICK = Limits(backoff=0.0, call_timeout=5.0)


def graph(n, edges, **more):
    return TaskGraph([SubTask(f"n{i}", f"do {i}") for i in range(n)],
                     [Edge(f"n{u}", f"n{v}", c) for u, v, c in edges], **more)


@st.composite
def dags(draw, most=7):
    n = draw(st.integers(1, most))
    pairs = list(itertools.combinations(range(n), 2))
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    names = draw(st.permutations(range(n)))
    return n, [(names[u], names[v], draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))) for u, v in chosen]


class Scripted:
    """An agent that answers by a function of the text, and remembers what it was asked."""

    name = "scripted"

    def __init__(self, answer, delay=0.0, room=10**9):
        self.answer, self.asked, self.delay, self.room = answer, [], delay, room
        self.live = self.most = self.opened = self.closed = 0

    def open(self, common):
        self.opened += 1

    def close(self):
        self.closed += 1

    def fits(self, text, tokens):
        return len(text) <= self.room

    async def ask(self, text, *, max_tokens, seed):
        self.asked.append(text)
        self.live += 1
        self.most = max(self.most, self.live)
        await asyncio.sleep(self.delay)
        self.live -= 1
        out = self.answer(text)
        if isinstance(out, Exception):
            raise out
        return Reply(out, len(text), len(out.split()), "stop")


def teacher(case):
    """An agent that does every part of a generated task right, given what it is told."""
    subs = {s.id: s for s in [*case.subs, *([case.merge] if case.merge else [])]}

    def answer(text):
        lines = [line.strip() for line in text.splitlines()]
        if lines[-1] == orchestra.PLAN:
            return orchestra._plan_lines(case)
        if lines[-1] == orchestra.CHECK:
            return orchestra.FINE
        if lines[-1] == orchestra.SPLIT:
            return orchestra.plan_json(case)
        mine = [i for i, s in subs.items() if f"{i}: {s.text}" in lines]
        told = "\n".join(line for line in lines if line not in {f"{i}: {subs[i].text}" for i in mine} and not line.startswith("says:"))
        known, out = orchestra.claims(told), []
        for i in mine:
            if f"{i} = " in told and subs[i].op[0] == "take":
                out.append(orchestra.line_of(i, known[i]))
                continue
            line, known[i] = orchestra.solve(subs[i], known, list(known.values()))
            out.append(line)
        return "\n".join(out)

    return Scripted(answer)


def task_of(case):
    return TaskGraph([SubTask(s.id, s.text) for s in case.subs], [Edge(*e) for e in case.edges], common=case.common,
                     merge=case.merge.text if case.merge else None,
                     outputs=[s.id for s in case.subs] if case.kind == "dense" else None)


# Graphs

@settings(max_examples=60, deadline=None)
@given(dags())
def test_measures_equal_brute_force(drawn):
    n, edges = drawn
    g, near = graph(n, edges), {i: [v for u, v, _ in edges if u == i] for i in range(n)}
    paths = [[i] for i in range(n)]
    every = []
    while paths:
        every += paths
        paths = [[*p, v] for p in paths for v in near[p[-1]]]
    m = g.measures
    depth_of = {v: max(len(p) for p in every if p[-1] == v) for v in range(n)}
    assert m.depth == max(map(len, every)) and m.delta == 32.0 * m.depth
    assert m.omega == max(sum(d == k for d in depth_of.values()) for k in range(1, n + 1))
    reach = {(p[0], p[-1]) for p in every if len(p) > 1}
    antichain = max(k for k in range(1, n + 1) for s in itertools.combinations(range(n), k)
                    if not any(p in reach for p in itertools.permutations(s, 2)))
    assert m.omega <= antichain and m.r == m.omega / n
    assert m.gamma == pytest.approx(sum(c for *_, c in edges) / len(edges) if edges else 0)
    place = {i: k for k, i in enumerate(g.order)}
    assert all(place[u] < place[v] for u, v, _ in edges) and sorted(g.order) == list(range(n))


@settings(max_examples=40, deadline=None)
@given(dags(), st.randoms())
def test_the_router_knows_neither_names_nor_the_order_of_edges(drawn, rng):
    n, edges = drawn
    names = [f"x{i}" for i in range(n)]
    rng.shuffle(names)
    mixed = list(edges)
    rng.shuffle(mixed)
    nodes = [SubTask(names[i], "") for i in range(n)]
    rng.shuffle(nodes)
    other = TaskGraph(nodes, [Edge(names[u], names[v], c) for u, v, c in mixed])
    assert Router().route(other) == Router().route(graph(n, edges))
    assert (other.measures.omega, other.measures.depth) == (graph(n, edges).measures.omega, graph(n, edges).measures.depth)


@pytest.mark.parametrize("n, edges, topology", [
    (1, [], "single"),
    (3, [], "parallel"),
    (4, [(0, 1, 0.7), (1, 2, 0.7), (2, 3, 0.7)], "sequential"),
    (6, [(u, v, 0.7) for u in range(3) for v in range(3, 6)], "hierarchical"),
    (5, [(u, v, 0.7) for u in range(2) for v in range(2, 5)], "hybrid"),
    (5, [(u, 4, 0.3) for u in range(4)], "parallel"),
    (6, [(0, 3, 0.3), (1, 3, 0.3), (2, 4, 0.7), (3, 5, 0.3), (4, 5, 0.3)], "hybrid"),
])
def test_routes(n, edges, topology):
    assert Router().route(graph(n, edges)) == topology


def test_thresholds_are_options_and_priors_are_learned():
    g = graph(5, [(u, 4, 0.3) for u in range(4)])
    assert Router(Thresholds(theta_omega=0.9)).route(g) == "hybrid"
    log = [Outcome("sums", f"t{i}", g.measures, way, score) for i in range(10)
           for way, score in (("parallel", 0.2), ("hybrid", 0.9))]
    priors = learn_priors(log)
    assert priors["sums"] == Bias(omega=0.3)
    router = Router(priors=priors)
    assert router.route(g, "sums") == "hybrid" and router.route(g) == router.route(g, "poems") == "parallel"
    assert learn_priors(log[:10]) == {} and learn_priors([o for o in log if o.topology == "parallel"]) == {}
    with pytest.raises(OptionError, match="theta_gamma"):
        Thresholds(theta_gamma=2)


def steps_of(n):
    """Lines executed while a graph of ``n`` nodes and 3 n edges is built, measured and routed."""
    rng = random.Random(0)
    nodes = [SubTask(str(i), "") for i in range(n)]
    edges = list({(a, b): Edge(str(a), str(b), 0.3) for a, b in
                  ((min(p), max(p)) for p in (rng.sample(range(n), 2) for _ in range(3 * n)))}.values())
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        Router().route(TaskGraph(nodes, edges))
    finally:
        sys.settrace(None)
    return count


def test_routing_is_linear():
    assert steps_of(1600) / steps_of(400) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("plan, word", [
    ({"subtasks": []}, "at least one"),
    ({"subtasks": [{"id": "a", "instruction": "x"}, {"id": "a", "instruction": "y"}]}, "'a'"),
    ({"subtasks": [{"id": "a", "instruction": "x"}], "edges": [["a", "b"]]}, "'b'"),
    ({"subtasks": [{"id": "a", "instruction": "x"}], "edges": [["a", "a"]]}, "'a' depends on itself"),
    ({"subtasks": [{"id": i, "instruction": i} for i in "abcd"],
      "edges": [["a", "b"], ["b", "c"], ["c", "b"], ["c", "d"]]}, "c -> b -> c|b -> c -> b"),
    ({"subtasks": [{"id": i, "instruction": i} for i in "ab"], "edges": [["a", "b"], ["a", "b", 0.3]]}, "twice"),
    ({"subtasks": [{"id": i, "instruction": i} for i in "ab"], "edges": [["a", "b", 1.5]]}, "coupling=1.5"),
    ({"subtasks": [{"id": i, "instruction": i} for i in "ab"], "edges": [["a", "b", "tight"]]}, "'tight'.*critical"),
    ({"subtasks": [{"id": "a"}]}, "'a' has no instruction"),
    ({"subtasks": [{"id": "a", "instruction": "x", "w": 0}]}, "subtasks.0"),
    ({"subtasks": [{"id": "a", "instruction": "x", "wait": 1}]}, "subtasks.0.wait"),
    ({"subtasks": [{"id": "a", "instruction": "x"}], "outputs": ["z"]}, "'z'"),
    ("{not json", "no JSON"), ("[3]", "top"), ('{"a": [3]}', "subtasks"), ('{"a": [], "b": [["c", 0.3]]}', "no instruction"),
])
def test_bad_plans_are_refused_by_name(plan, word):
    with pytest.raises(InputError, match=word):
        TaskGraph.read(plan)


@settings(max_examples=20, deadline=None)
@given(dags())
def test_a_graph_survives_json(drawn):
    g = graph(*drawn, common="c", merge="m")
    assert TaskGraph.read(json.dumps(g.dump())).dump() == g.dump()


@settings(max_examples=60, deadline=None)
@given(dags())
def test_groups_join_critical_pairs_and_stay_acyclic(drawn):
    n, edges = drawn
    groups = groups_of(graph(n, edges))
    of = {i: k for k, g in enumerate(groups) for i in g}
    assert sorted(i for g in groups for i in g) == list(range(n))
    assert all(of[u] == of[v] for u, v, c in edges if c == 1.0)
    if not any(c == 1.0 for *_, c in edges):
        assert len(groups) == n
    TaskGraph([SubTask(str(k), "") for k in range(len(groups))],  # refuses a cycle
              [Edge(str(a), str(b)) for a, b in {(of[u], of[v]) for u, v, _ in edges} if a != b])


# Generated tasks

@pytest.mark.parametrize("kind", orchestra.KINDS)
def test_generated_calls_and_their_split(kind):
    from stretto.training.agent_data import cases
    from stretto.zoo import workbook

    test = cases("test", kind, 20, 1)
    assert test == cases("test", kind, 20, 1) and all(workbook._split(c.text) == "test" for c in test)
    rng = random.Random(kind)
    for case in cases("train", kind, 60, 1):
        assert orchestra.valid(case, case.values) and workbook._split(case.text) == "train"
        prompt, answer = orchestra.example(rng, case)
        assert prompt.startswith(case.common + "\n") and answer and len(workbook.encode(
            workbook.Example("", "", prompt, answer))[0]) < 420
    assert Router().route(task_of(test[0])) == {
        "wide": "parallel", "deep": "sequential", "layered": "hybrid", "dense": "hierarchical"}[kind]


# Execution

@settings(max_examples=40, deadline=None)
@given(dags(), st.integers(1, 4), st.sampled_from(["parallel", "sequential", "hybrid", "hierarchical"]))
def test_every_subtask_runs_once_and_after_its_predecessors(drawn, live, way):
    n, edges = drawn
    g = graph(max(n, 2), edges)
    agent = Scripted(lambda text: "done")
    out = orchestrate(g, way, agents=agent, validator=lambda c: True,
                      options=Options(limits=Limits(backoff=0, max_live=live)))
    work = [c for c in out.trace if c.role == "worker"]
    assert sorted(i for c in work for i in c.ids) == sorted(g.index) and agent.most <= live
    started = {i: c for c in work for i in c.ids}
    for u, v, _ in edges:
        a, b = started[f"n{u}"], started[f"n{v}"]
        assert a is b or (a.end <= b.start and (way == "parallel" or a.number in b.after or way == "sequential"))
    assert agent.opened == agent.closed == 1


def test_the_longest_remaining_path_goes_first():
    ran = []

    async def work(u):
        ran.append(u)

    asyncio.run(run_ready({"a": [], "b": [], "c": ["a"], "d": ["c"]}, {"a": 3, "b": 9, "c": 2, "d": 1}, work, max_live=1))
    assert ran == ["b", "a", "c", "d"]


def test_an_error_cancels_what_is_under_way():
    ended = []

    async def work(u):
        if u == "bad":
            raise ValueError("no")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(u)

    with pytest.raises(ValueError):
        asyncio.run(run_ready({"slow": [], "bad": []}, {"slow": 1, "bad": 1}, work, max_live=4))
    assert ended == ["slow"]


@pytest.mark.parametrize("kind", orchestra.KINDS)
@pytest.mark.parametrize("way", ["auto", "parallel", "sequential", "hybrid", "hierarchical", "single"])
def test_right_agents_give_right_answers(kind, way):
    for seed in range(3):
        case = orchestra.case(random.Random(seed), kind)
        out = orchestrate(task_of(case), way, agents=teacher(case), options=Options(limits=QUICK))
        if kind != "dense" or way in ("sequential", "hierarchical", "single", "auto"):
            assert orchestra.valid(case, out.values), (way, out.answer, case.text)
            assert out.ok and out.consistency == 1.0 and len(out.topologies) == 1


def test_what_each_topology_passes_on():
    g = TaskGraph([SubTask(i, f"find {i}") for i in "abc"], [Edge("a", "c", 0.3), Edge("b", "c", 0.7)])
    full = {i: f"{i}: {k} + 1 = {k + 1}, {i} = {k + 1}" for k, i in enumerate("abc")}
    seen = {}
    for way in ("parallel", "hybrid", "sequential"):
        agent = Scripted(lambda text: next(full[i] for i in "abc" if f"find {i}" in text))
        orchestrate(g, way, agents=agent)
        seen[way] = next(t for t in agent.asked if "find c" in t)
    assert seen["parallel"] == " known:\n a: a = 1\n b: b = 2\n c: find c"
    assert seen["hybrid"] == f" known:\n a: a = 1\n {full['b']}\n c: find c"
    assert seen["sequential"] == f" known:\n {full['a']}\n {full['b']}\n c: find c"
    agent = Scripted(lambda text: next(full[i] for i in "abc" if f"find {i}" in text))
    orchestrate(g, "parallel", agents=agent, options=Options(blind=True))
    assert " c: find c" in agent.asked


def test_weak_results_are_cut_first_when_they_do_not_fit():
    g = TaskGraph([SubTask("a", "find a"), SubTask("b", "find b")], [Edge("a", "b", 0.7)])
    agent = Scripted(lambda text: "a: " + "1 + 1 = 2, " * 20 + "a = 2" if "find a" in text else "b = 2", room=60)
    out = orchestrate(g, "hybrid", agents=agent)
    assert agent.asked[1] == " known:\n a: a = 2\n b: find b" and "cut to fit" in out.notes[0]


def test_a_failed_agent_is_marked_and_named():
    g = TaskGraph([SubTask(i, f"find {i}") for i in "ab"], [Edge("a", "b")])
    agent = Scripted(lambda text: EngineError("down") if "find a" in text else "b = 1")
    out = orchestrate(g, "hybrid", agents=agent, options=Options(escalate=False, limits=QUICK))
    assert not out.ok and "a failed: down" in out.notes and "a: a = missing" in agent.asked[-1]
    assert [c.tries for c in out.trace] == [2, 1]
    no = Scripted(lambda text: InputError("never"))
    assert [c.tries for c in orchestrate(g, "hybrid", agents=no, options=Options(escalate=False, limits=QUICK)).trace] == [1, 1]


def test_a_silent_agent_is_not_waited_for():
    g = TaskGraph([SubTask(i, i) for i in "ab"])
    out = orchestrate(g, agents=Scripted(lambda t: "x = 1", delay=30),
                      options=Options(limits=Limits(call_timeout=0.05, retries=0, timeout=0.5, backoff=0)))
    assert not out.ok and out.seconds < 3 and any("no answer within" in n for n in out.notes)


@pytest.mark.parametrize("limit", [{"max_calls": 3}, {"max_tokens": 5}])
def test_limits_are_hard(limit):
    g = TaskGraph([SubTask(i, i) for i in "abcdefgh"])
    agent = Scripted(lambda t: "one two three")
    out = orchestrate(g, "sequential", agents=agent, options=Options(limits=Limits(backoff=0, **limit)))
    assert not out.ok and len(agent.asked) <= 3 and any(n.startswith("stopped") for n in out.notes)


def test_calls_at_the_same_time_share_the_token_limit():
    class Greedy(Scripted):
        async def ask(self, text, *, max_tokens, seed):
            await super().ask(text, max_tokens=max_tokens, seed=seed)
            return Reply("x", 1, max_tokens, "length")

    g = TaskGraph([SubTask(i, i) for i in "abcdefgh"])
    out = orchestrate(g, "parallel", agents=Greedy(str, delay=0.01),
                      options=Options(limits=Limits(max_tokens=250, call_tokens=100)))
    assert out.tokens == 250 and not out.ok


def test_inside_a_loop_the_async_twin_is_named():
    async def wrong():
        orchestrate(graph(2, []), agents=Scripted(str))

    with pytest.raises(InputError, match="aorchestrate"):
        asyncio.run(wrong())


# Rounds

@settings(max_examples=40, deadline=None)
@given(dags(), st.randoms(use_true_random=False), st.sampled_from(["auto", "parallel", "hybrid"]))
def test_it_ends_within_the_bound_whatever_the_agents_say(drawn, rng, way):
    n, edges = drawn
    g = graph(max(2, n), edges, merge=rng.choice([None, "add all"]))

    def adversary(text):
        return rng.choice([
            EngineError("down"), "", orchestra.FINE, orchestra.AGAIN + ", ".join(g.index), "n0 = 1, n1 = 2", "n1 = 7",
            "1 + 1 = 3", "\n".join(f"{i}: {i} = {rng.randint(0, 9)}" for i in g.index),
        ])

    agent = Scripted(adversary)
    out = orchestrate(g, way, agents=agent, options=Options(limits=Limits(backoff=0, max_calls=None)),
                      validator=lambda c: Verdict(False, frozenset(rng.sample(sorted(g.index), 1)), "no"))
    assert not out.ok and out.calls == len(agent.asked) <= call_bound(len(g.nodes))
    assert len(out.topologies) == len(set(out.topologies)) <= 4
    assert estimate(g, way).most_calls >= out.calls


def test_a_validator_that_always_fails_ends_after_four_rounds():
    g = graph(4, [])
    agent = Scripted(lambda text: "done")
    out = orchestrate(g, agents=agent, validator=lambda c: False)
    assert out.topologies == ["parallel", "hybrid", "hierarchical", "sequential"] and not out.ok
    assert len(agent.asked) == 4 + 4 + (1 + 4 + 1) + 4 <= call_bound(4)


def test_a_round_reuses_what_was_not_at_fault():
    case = orchestra.case(random.Random(3), "layered")
    right, wrong = teacher(case), case.subs[0]
    lied = []

    def answer(text):
        if wrong.text in text and not lied:
            lied.append(text)
            return f"{wrong.id}: 1 + 1 = 3, {wrong.id} = 3"
        return right.answer(text)

    agent = Scripted(answer)
    out = orchestrate(task_of(case), agents=agent)
    again = [i for c in out.trace if c.round == 1 and c.role == "worker" for i in c.ids]
    assert out.ok and orchestra.valid(case, out.values) and out.topologies == ["hybrid", "hierarchical"]
    assert set(again) == task_of(case).descendants([wrong.id]) and len(again) < len(case.subs)


def test_disputed_values_go_to_a_judge():
    g = TaskGraph([SubTask("a", "find a"), SubTask("b", "find b")], [Edge("a", "b", 0.7)])

    def answer(text):
        if "says: a = 1, a = 2" in text:
            return "a: a = 2"
        return "a: a = 1" if "find a" in text else "b: a = 2, 2 + 3 = 5, b = 5"

    out = orchestrate(g, "hybrid", agents=Scripted(answer))
    assert [c.role for c in out.trace] == ["worker", "worker", "judge"] and out.ok and out.values["b"] == "5"
    assert out.consistency == 1.0


def test_consistency_and_similarity():
    texts = ["b: 1 + 1 = 2, b = 2", "so b = 2", "free words here", "free words there", "", "[1, 2]", "[1,2]"]
    for a in texts:
        assert similarity(a, a) == 1.0
        for b in texts:
            assert 0 <= similarity(a, b) <= 1 and similarity(a, b) == similarity(b, a)
    assert similarity(texts[0], texts[1]) == similarity(texts[5], texts[6]) == 1.0
    assert similarity(texts[2], texts[3]) == pytest.approx(2 / 3)
    assert consistency([["one"]]) == consistency() == consistency(outputs=["a = 1", "b = 2"]) == 1.0
    assert consistency(outputs=["a = 1, b = 2", "a = 1, b = 3"]) == 0.5
    reports = {i: Report(i, t, 0) for i, t in {"a": "a: a = 1", "b": "b: a = 2, b = 4"}.items()}
    assert conflicts(reports) == {"a": ["1", "2"]}
    with pytest.raises(OptionError, match="lam"):
        similarity("a", "b", lam=2)


def test_arithmetic_names_who_is_wrong():
    ok = {"b": "b: 12 + 9 = 21, 21 - 4 = 17, b = 17", "c": "c: b = 17, 17 * 2 = 34, c = 34"}
    values = {"b": "17", "c": "34"}
    assert arithmetic(Candidate("", values, ok, 1.0)).ok
    assert arithmetic(Candidate("", values, ok | {"b": "b: 12 + 9 = 22, b = 17"}, 1.0)).faulty == {"b"}
    assert arithmetic(Candidate("", values, ok | {"c": "c: b = 18, c = 34"}, 1.0)).faulty == {"c"}
    assert arithmetic(Candidate("", {"b": "17"}, ok, 1.0)).faulty == {"c"}


# Plans by an agent

def test_a_plan_is_asked_for_repaired_once_and_given_up():
    case = orchestra.case(random.Random(5), "wide")
    agent = teacher(case)
    out = orchestrate(case.text, agents=agent)
    assert out.topologies == ["parallel"] and orchestra.valid(case, out.values) and out.trace[0].role == "plan"
    replies = iter(["nonsense", orchestra.plan_json(case)])
    fixed = Scripted(lambda t: next(replies) if orchestra.SPLIT in t else agent.answer(t))
    out = orchestrate(case.text, agents=fixed)
    assert orchestra.valid(case, out.values) and "Not: the plan is no JSON" in fixed.asked[1]
    never = Scripted(lambda t: "no plan")
    out = orchestrate(case.text, agents=never)
    assert len(never.asked) == 3 and out.topologies == ["single"] and out.answer == "no plan"
    assert any("one call" in n for n in out.notes)
    alone = Scripted(lambda t: "42")
    assert orchestrate("What is 6 times 7?", agents=alone).answer == "42" and len(alone.asked) == 1


@pytest.mark.parametrize("task, options, word", [
    ("  ", {}, "empty"), (graph(3, []), {"limits": Limits(max_subtasks=2)}, "max_subtasks=2"),
])
def test_bad_tasks(task, options, word):
    with pytest.raises(InputError, match=word):
        orchestrate(task, agents=Scripted(str), options=Options(**options))


def test_bad_options():
    with pytest.raises(OptionError, match="topology='star'"):
        orchestrate(graph(2, []), "star", agents=Scripted(str))
    with pytest.raises(OptionError, match="agents"):
        orchestrate(graph(2, []), agents=[])
    with pytest.raises(OptionError, match="agents"):
        orchestrate(graph(2, []), agents=3)
    with pytest.raises(OptionError, match="theta_cs"):
        Options(theta_cs=3)
    with pytest.raises(OptionError, match="max_live"):
        Limits(max_live=0)
    with pytest.raises(OptionError, match="url"):
        Endpoint("localhost", "m")


# Agents behind HTTP

@pytest.fixture
def server():
    """An OpenAI-compatible server whose answers are set by the test: (status, body) by the user's text."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = web.answer(body["messages"][0]["content"])
            web.asked.append((self.path, self.headers.get("Authorization"), body))
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.asked, web.daemon_threads = [], True
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield web
    web.shutdown()
    web.server_close()


def chat(text):
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}],
                 "usage": {"prompt_tokens": 5, "completion_tokens": 3}}


def test_endpoints_play_agents_and_mix(server):
    case = orchestra.case(random.Random(1), "layered")
    helper, here = teacher(case), teacher(case)
    server.answer = lambda text: chat(helper.answer(text.removeprefix(case.common + "\n")))
    far = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "far", key="secret")
    out = orchestrate(task_of(case), agents=[far, here])
    assert out.ok and orchestra.valid(case, out.values) and out.evaluated is None
    assert {c.agent for c in out.trace} == {far.name, "scripted"} and out.tokens == sum(c.completion_tokens for c in out.trace)
    path, key, body = server.asked[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "far"
    assert body["messages"][0]["content"].startswith(case.common + "\n")


@pytest.mark.parametrize("answers, tries, word", [
    ([(503, {}), chat("a = 1")], 2, None), ([(400, {"error": "no such model"})], 1, "no such model"),
    ([(200, {"choices": []})] * 2, 2, "no chat completion"), ([(500, {})] * 2, 2, "answered 500"),
])
def test_endpoints_that_fail(server, answers, tries, word):
    left = list(answers)
    server.answer = lambda text: left.pop(0)
    far = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "far")
    out = orchestrate(TaskGraph([SubTask("a", "find a")]), agents=[far], options=Options(limits=QUICK))
    assert out.trace[0].tries == tries and out.ok == (word is None)
    assert word is None or word in out.notes[0]


def test_an_endpoint_that_is_not_there():
    out = orchestrate(TaskGraph([SubTask("a", "find a")]), agents=Endpoint("http://127.0.0.1:9/v1", "x", timeout=2),
                      options=Options(limits=Limits(retries=0, backoff=0)))
    assert not out.ok and "cannot be asked" in out.notes[0]


# Agents of one engine

@pytest.fixture(scope="module")
def llm():
    return LLM("zoo:tiny", dtype="float32", deterministic=True, enable_prefix_caching=False)


COMMON = "We add numbers. " * 12 + "Be exact."


@pytest.mark.parametrize("way", ["parallel", "sequential", "hybrid", "hierarchical"])
def test_engine_agents_equal_separate_calls_and_share_the_prompt(llm, way):
    g = TaskGraph([SubTask(i, f"{k} + 2") for k, i in enumerate("abcd")], [Edge("a", "c", 0.3), Edge("b", "d", 1.0)],
                  common=COMMON)
    out = orchestrate(g, way, agents=llm, validator=lambda c: True, options=Options(limits=Limits(call_tokens=12)))
    assert llm.runner.alloc.used == 0 and not llm.engine.busy
    assert all(c.error is None for c in out.trace)
    agent = EngineAgent(llm)
    agent.open(COMMON)
    head = len(agent.head)
    agent.close()
    assert head > 40
    asked = []
    replay = Scripted(lambda text: asked.append(text) or next(c.text for c in out.trace if c.prompt_hash == _hash(text)))
    orchestrate(g, way, agents=replay, validator=lambda c: True, options=Options(limits=Limits(call_tokens=12)))
    rows = head
    for text in asked:
        call = next(c for c in out.trace if c.prompt_hash == _hash(text))
        prompt = llm.chat_prompt([{"role": "user", "content": f"{COMMON}\n{text}"}])
        tokens = call.completion_tokens
        plain = llm.generate(prompt, SamplingParams(max_tokens=tokens, temperature=0.0))[0].outputs[0]
        assert plain.text == call.text and len(plain.token_ids) == tokens
        rows += call.prompt_tokens - head + tokens - 1
    assert out.evaluated == rows


def _hash(text):
    import hashlib

    return hashlib.sha256(f"{COMMON}\n{text}".encode()).hexdigest()[:16]


def test_a_single_step_is_the_plain_call(llm):
    text = "Sort this list: 4, 2, 9"
    out = orchestrate(text, agents=llm)
    plain = llm.generate(llm.chat_prompt([{"role": "user", "content": text}]), SamplingParams(max_tokens=160, temperature=0.0))
    assert out.answer == plain[0].outputs[0].text and out.calls == 1 and out.topologies == ["single"]


def test_a_whole_task_in_one_call_keeps_to_the_context(llm):
    out = orchestrate(graph(12, []), "single", agents=llm)
    assert out.calls == 1 and 0 < out.tokens <= llm.max_model_len and set(out.topologies) == {"single"}


def test_orchestrations_share_an_engine(llm):
    async def both():
        a, b = (aorchestrate(graph(2, []), agents=llm, validator=lambda c: True,
                             options=Options(limits=Limits(call_tokens=8))) for _ in range(2))
        return await asyncio.gather(a, b)

    one, two = asyncio.run(both())
    assert one.answer == two.answer and llm.runner.alloc.used == 0


def test_embeddings_make_equal_words_equal(llm):
    vectors = EngineAgent(llm).embed(["cat dog", "dog cat", "17 + 4"])
    assert float(vectors[0] @ vectors[0]) == pytest.approx(1)
    assert float(vectors[0] @ vectors[2]) < 0.99 and float((vectors * vectors).sum(-1).min()) == pytest.approx(1)
