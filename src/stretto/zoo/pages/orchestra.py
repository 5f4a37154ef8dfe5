"""Tasks of several sub-tasks with a known dependency graph, and what agents are told to do with them.

Four kinds. wide: word problems that need nothing from each other, and their sum. deep: every step needs the one before.
layered: word problems, sums of some of them, and a sum of sums. dense: everybody takes one of a few colours, nobody the
same; a later layer must know what the earlier one took, and within a layer nobody sees anybody.

Every answer is one line, "owl: 12 + 9 = 21, 21 - 4 = 17, owl = 17": the inputs it uses, its steps, and its result, so
that results can be compared and arithmetic checked without a model. Ids and fixed words are tokens that zoo:tiny knows:
its single letters were hardly ever trained and look all the same to it. Every line begins with a blank, since a word
behind one is another token than the same word at the start of a line.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from stretto.zoo.pages.words import ANIMALS, COLOURS, FRUIT, NAMES, TOOLS

__all__ = [
    "KINDS", "Sub", "TaskCase", "agent_text", "case", "claims", "example", "line_of", "plan_json", "solve", "valid",
]

TOTAL = "total"
KINDS = ("wide", "deep", "layered", "dense")
SAME = "One color each, not one twice."
CHECK, PLAN, SPLIT = "check.", "plan.", "design."
FORMS = {"work": 56, "many": 22, "plan": 4, "check": 6, "said": 9, "split": 3}  # calls of a kind, in percent
DENSE_FORMS = {"work": 38, "many": 20, "plan": 24, "check": 6, "said": 9, "split": 3}  # its plan is its solution
FINE, AGAIN = "all true", "not "  # what the lead says of reports; behind the second, ids
_CLAIM = re.compile(r"\b([A-Za-z_][\w-]*) = (-?[\w.]*\w)")


@dataclass(frozen=True, slots=True)
class Sub:
    """One sub-task. ``op``: what is computed: ("steps", [(x, sign, y), ...]) with None for the result so far; ("plus",
    source, n) with n of any sign; ("add", sources); ("take", options)."""

    id: str
    text: str
    op: tuple


@dataclass(frozen=True, slots=True)
class TaskCase:
    """``edges``: (u, v, coupling); ``goal``: id whose value is the answer, "" = all values; ``merge``: the sum that
    the synthesis makes where the parts have no sink of their own."""

    kind: str
    common: str
    subs: tuple[Sub, ...]
    edges: tuple[tuple[str, str, float], ...]
    goal: str = ""
    merge: Sub | None = None

    @property
    def text(self) -> str:
        """The whole task as one reads it."""
        subs = [*self.subs, *([self.merge] if self.merge else [])]
        return "\n".join([self.common, *(f" {s.id}: {s.text}" for s in subs)])

    @property
    def values(self) -> dict[str, str]:
        """The right value of every id (of "dense": one right answer of several)."""
        found: dict[str, str] = {}
        for sub in [*self.subs, *([self.merge] if self.merge else [])]:
            found[sub.id] = solve(sub, found, list(found.values()))[1]
        return found


def solve(sub: Sub, known: Mapping[str, str], taken: Sequence[str] = ()) -> tuple[str, str]:
    """(answer line, value) of a sub-task that knows these values; colours of ``taken`` are not open."""
    kind, parts = sub.op[0], []
    if kind == "take":
        value = "missing"
        for option in sub.op[1]:
            if option not in taken:
                value = option
                parts.append(f"{option} open")
                break
            parts.append(f"{option} not open")
        return _line(sub.id, parts, value)
    sources = {"steps": [], "plus": [sub.op[1]], "add": sub.op[1]}[kind]
    lost = [s for s in sources if not re.fullmatch(r"-?\d+", known.get(s, "missing"))]
    if lost:
        return _line(sub.id, [f"{s} = missing" for s in lost], "missing")
    total: int | None = None
    if kind == "steps":
        for x, sign, y in sub.op[1]:
            total = _step(parts, total if x is None else x, sign, y)
    elif kind == "plus":
        parts.append(f"{sources[0]} = {known[sources[0]]}")
        total = _step(parts, int(known[sources[0]]), "-" if sub.op[2] < 0 else "+", abs(sub.op[2]))
    else:
        for s in sources:
            parts.append(f"{s} = {known[s]}")
            total = int(known[s]) if total is None else _step(parts, total, "+", int(known[s]))
    return _line(sub.id, parts, str(total))


def _step(parts: list[str], x: int | None, sign: str, y: int) -> int:
    assert x is not None
    out = {"+": x + y, "-": x - y, "*": x * y}[sign]
    parts.append(f"{x} {sign} {y} = {out}")
    return out


def _line(id: str, parts: Sequence[str], value: str) -> tuple[str, str]:
    return f"{id}: {', '.join([*parts, f'{id} = {value}'])}", value


def line_of(id: str, value: str) -> str:
    """The short form of an answer: its result alone."""
    return f"{id}: {id} = {value}"


def claims(text: str) -> dict[str, str]:
    """What a text says of ids: the last "x = value" for each."""
    return dict(_CLAIM.findall(text))


def agent_text(
    instructions: Sequence[tuple[str, str]], *, known: Sequence[str] = (), plan: str = "", said: Sequence[str] = (),
    order: str = "",
) -> str:
    """What an agent is told behind the common prompt: results of others, the lead's plan, its own part, values that
    were given for it and are in doubt, and for the lead an order (PLAN, CHECK, SPLIT)."""
    parts = ["known:", *known] if known else []
    parts += ["plan:", *plan.splitlines()] if plan else []
    parts += [f"{i}: {text}" for i, text in instructions]
    parts += [f"says: {', '.join(said)}"] if said else []
    parts += [order] if order else []
    return "\n".join(f" {p.strip()}" for p in parts)


def valid(case: TaskCase, values: Mapping[str, str]) -> bool:
    """Whether an answer is right: the goal's number, or colours that keep all rules."""
    if case.kind != "dense":
        return values.get(case.goal) == case.values[case.goal]
    got = [values.get(s.id, "") for s in case.subs]
    return len(set(got)) == len(got) and all(v in s.op[1] for v, s in zip(got, case.subs, strict=True))


def plan_json(case: TaskCase) -> str:
    """The task graph as a model writes it: what each part needs, and how much; instructions are the task's lines."""
    return json.dumps({s.id: [[u, c] for u, v, c in case.edges if v == s.id] for s in case.subs})


def case(rng: random.Random, kind: str) -> TaskCase:
    """One task of ``kind``."""
    return {"wide": _wide, "deep": _deep, "layered": _layered, "dense": _dense}[kind](rng)


def _leaf(rng: random.Random, id: str) -> Sub:
    name, (thing, other) = rng.choice(NAMES), rng.sample(FRUIT + TOOLS, 2)
    form = rng.randrange(3)
    if form == 0:
        a, b = rng.randint(5, 40), rng.randint(2, 30)
        c = rng.randint(2, min(a + b - 1, 50))
        return Sub(id, f"{name} has {a} {thing}s, buys {b} and gives away {c}.",
                   ("steps", ((a, "+", b), (None, "-", c))))
    if form == 1:
        a, b, c = (rng.randint(3, 20) for _ in range(3))
        return Sub(id, f"a box holds {a} {thing}s, {b} {other}s and {c} more.",
                   ("steps", ((a, "+", b), (None, "+", c))))
    n, p, e = rng.randint(2, 7), rng.randint(2, 7), rng.randint(1, 15)
    return Sub(id, f"{n} {thing}s for {p} coins each and {e} coins for the bus.",
               ("steps", ((n, "*", p), (None, "+", e))))


def _add(id: str, sources: Sequence[str]) -> Sub:
    return Sub(id, f"add {', '.join(sources[:-1])} and {sources[-1]}.", ("add", tuple(sources)))


def _wide(rng: random.Random) -> TaskCase:
    ids = rng.sample(ANIMALS, rng.randint(4, 6))
    leaves = tuple(_leaf(rng, i) for i in ids)
    return TaskCase("wide", "We find the total.", leaves, (), TOTAL, _add(TOTAL, ids))


def _deep(rng: random.Random) -> TaskCase:
    ids = rng.sample(ANIMALS, rng.randint(5, 8))
    subs, value = [_leaf(rng, ids[0])], 0
    value = int(solve(subs[0], {})[1])
    for source, id in pairwise(ids):
        n = rng.randint(2, 40)
        n = -n if value > n and (value > 60 or rng.random() < 0.4) else n
        value += n
        subs.append(Sub(id, f"{source} {'minus' if n < 0 else 'plus'} {abs(n)}.", ("plus", source, n)))
    edges = tuple((a, b, 0.7) for a, b in pairwise(ids))
    return TaskCase("deep", "One by one.", tuple(subs), edges, ids[-1])


def _layered(rng: random.Random) -> TaskCase:
    """Three or four leaves, sums of two of them, a shift of each sum, and the sum of those."""
    m = rng.randint(3, 4)
    ids = rng.sample(ANIMALS, m + 2 + rng.randint(1, 2) + 1)
    leaves, rest = ids[:m], ids[m:]
    subs = [_leaf(rng, i) for i in leaves]
    edges: list[tuple[str, str, float]] = []
    sums = rest[:2]
    for s, sources in zip(sums, (leaves[:2], leaves[-2:]), strict=True):
        subs.append(_add(s, sources))
        edges += [(x, s, 0.3) for x in sources]
    shifts = rest[2:-1]
    for s, source in zip(shifts, sums, strict=False):
        n = rng.randint(2, 40)
        subs.append(Sub(s, f"{source} plus {n}.", ("plus", source, n)))
        edges.append((source, s, 0.7))
    last = [*shifts, *sums[len(shifts):]]
    subs.append(_add(rest[-1], last))
    edges += [(x, rest[-1], 0.3) for x in last]
    return TaskCase("layered", "We find the target.", tuple(subs), tuple(edges), rest[-1])


def _dense(rng: random.Random) -> TaskCase:
    """Two layers; everybody of the second must know everybody of the first. Taking the first open colour works."""
    while True:
        n = rng.randint(6, 7)
        ids, colours = rng.sample(ANIMALS, n), rng.sample(COLOURS, 8)
        subs = []
        for id in ids:
            options = rng.sample(colours, 4)
            subs.append(Sub(id, f"one of {', '.join(options[:-1])} and {options[-1]}.", ("take", tuple(options))))
        first = ids[: n // 2]
        edges = tuple((u, v, 0.7) for u in first for v in ids[n // 2 :])
        found = TaskCase("dense", SAME, tuple(subs), edges)
        if "missing" not in found.values.values():
            return found


def example(rng: random.Random, task: TaskCase) -> tuple[str, str]:
    """(prompt, answer) of one call that an orchestration of ``task`` may make, in any topology."""
    weights = DENSE_FORMS if task.kind == "dense" else FORMS
    form = rng.choices(list(weights), list(weights.values()))[0]
    makers = {"work": _work, "many": _many, "plan": _plan, "check": _check, "said": _said, "split": _split}
    text, answer = makers[form](rng, task)
    return f"{task.common}\n{text}", "\n".join(f" {line}" if form != "split" else line for line in answer.splitlines())


def _pairs(subs: Sequence[Sub]) -> list[tuple[str, str]]:
    return [(s.id, s.text) for s in subs]


def _reports(rng: random.Random, task: TaskCase, wrong: float = 0.0) -> dict[str, tuple[str, str]]:
    """Answer lines and values of all sub-tasks, each after the ones before; some of them ``wrong``."""
    known: dict[str, str] = {}
    out = {}
    for s in task.subs:
        line, value = solve(s, known, list(known.values()))
        if rng.random() < wrong:
            line, value = _spoil(rng, s, line, value, known)
        known[s.id], out[s.id] = value, (line, value)
    return out


def _spoil(rng: random.Random, s: Sub, line: str, value: str, known: Mapping[str, str]) -> tuple[str, str]:
    if s.op[0] == "take":
        used = [o for o in s.op[1] if o in known.values()]
        return _line(s.id, [f"{used[0]} open"], used[0]) if used else (line, value)
    false = str(max(0, int(value) + rng.choice((-10, -2, -1, 1, 2, 10)))) if value != "missing" else "missing"
    return re.sub(rf"= {value}\b", f"= {false}", line), false


def _work(rng: random.Random, task: TaskCase) -> tuple[str, str]:
    """One worker (or the sum at the end), who sees its predecessors, or all that came before, or the lead's plan."""
    reports = _reports(rng, task, wrong=0.03)
    pool = [*task.subs, *([task.merge] * 4 if task.merge else [])]
    if task.kind == "dense" and rng.random() < 0.7:
        pool = pool[len(pool) // 2 :]  # those who must look what is taken
    sub = rng.choice(pool)
    before = list(reports)[: task.subs.index(sub)] if sub in task.subs else list(reports)
    direct = [u for u, v, _ in task.edges if v == sub.id] or (before if sub is task.merge else [])
    plan = rng.random() < 0.2
    seen = before if rng.random() < 0.45 and not plan else [b for b in before if b in direct]
    if rng.random() < 0.05 and seen and task.kind != "dense":
        seen = [s for s in seen if rng.random() < 0.7]
    short = rng.random() < 0.5
    known = {i: reports[i][1] for i in seen}
    if known and rng.random() < 0.03 and task.kind != "dense":
        known[rng.choice(seen)] = "missing"
    lines = [line_of(i, known[i]) if short or known[i] != reports[i][1] else reports[i][0] for i in seen]
    text = agent_text(_pairs([sub]), known=lines, plan=_plan_lines(task) if plan else "")
    if plan and sub.op[0] == "take":
        return text, line_of(sub.id, task.values[sub.id])
    return text, solve(sub, known, list(known.values()))[0]


def _many(rng: random.Random, task: TaskCase) -> tuple[str, str]:
    """Several sub-tasks in one call: a part of the task, or all of it."""
    subs = [*task.subs, *([task.merge] if task.merge else [])]
    reports = _reports(rng, task)
    start = 0 if rng.random() < 0.5 else rng.randrange(len(subs) - 1)
    stop = len(subs) if start == 0 and rng.random() < 0.5 else rng.randint(start + 1, len(subs))
    known = {i: reports[i][1] for i in list(reports)[:start]}
    text = agent_text(_pairs(subs[start:stop]), known=[line_of(i, v) for i, v in known.items()])
    answers = []
    for s in subs[start:stop]:
        line, known[s.id] = solve(s, known, list(known.values()))
        answers.append(line)
    return text, "\n".join(answers)


def _plan_lines(task: TaskCase) -> str:
    """What the lead settles for all: who takes which colour, or who needs whose result."""
    if task.kind == "dense":
        return "\n".join(line for line, _ in _reports(random.Random(0), task).values())
    needs = {s.id: [u for u, v, _ in task.edges if v == s.id] for s in task.subs}
    return "\n".join(f"{i}: from {', '.join(us)}" for i, us in needs.items() if us) or "all open"


def _plan(rng: random.Random, task: TaskCase) -> tuple[str, str]:
    return agent_text(_pairs(task.subs), order=PLAN), _plan_lines(task)


def _check(rng: random.Random, task: TaskCase) -> tuple[str, str]:
    """The lead reads all reports: all true, or whose part must be done again."""
    right = _reports(rng, task)
    reports = _reports(rng, task, wrong=0.15 if rng.random() < 0.6 else 0.0)
    known: dict[str, str] = {}
    bad = []
    for s in task.subs:
        line, value = reports[s.id]
        if (line, value) != (solve(s, known, list(known.values())) if task.kind != "dense" else right[s.id]) and (
            task.kind != "dense" or value in known.values()
        ):
            bad.append(s.id)
        known[s.id] = value
    answer = AGAIN + ", ".join(bad) if bad else FINE
    return agent_text([], known=[line for line, _ in reports.values()], order=CHECK), answer


def _said(rng: random.Random, task: TaskCase) -> tuple[str, str]:
    """A part that is in doubt, with the values that were given for it."""
    reports = _reports(rng, task)
    sub = rng.choice([*task.subs, *([task.merge] * 3 if task.merge else [])])
    direct = [u for u, v, _ in task.edges if v == sub.id] if sub is not task.merge else list(reports)
    others = task.kind == "dense" or rng.random() < 0.5
    seen = [i for i in reports if i != sub.id] if others else direct
    known = {i: reports[i][1] for i in seen}
    line, value = solve(sub, known, list(known.values()))
    if value == "missing":
        return _work(rng, task)
    said = {_spoil(rng, sub, line, value, known)[1]} | ({value} if rng.random() < 0.4 else set())
    said_lines = [f"{sub.id} = {v}" for v in rng.sample(sorted(said), len(said))]
    return agent_text(_pairs([sub]), known=[line_of(i, v) for i, v in known.items()], said=said_lines), line


def _split(rng: random.Random, task: TaskCase) -> tuple[str, str]:
    merge = [task.merge] if task.merge else []
    return agent_text(_pairs([*task.subs, *merge]), order=SPLIT), plan_json(task)
