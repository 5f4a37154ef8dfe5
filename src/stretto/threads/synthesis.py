"""From the reports of sub-tasks to one answer: do they agree, who is right where they do not, and is the whole right?

The consistency score is the mean over pairs of outputs that can be compared: those that answer the same question, and
those that state values of the same ids. sim = (1 - lambda) lexical + lambda semantic; lexical is equality of extracted
answers where both have one, else token F1; semantic is the cosine of embeddings. Source: AdaptOrch (2026), "adaptive
synthesis".
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stretto.errors import OptionError
from stretto.threads.topologies import MISSING, Report, Work, correct
from stretto.zoo.pages.orchestra import agent_text, claims

__all__ = [
    "Candidate", "Verdict", "arithmetic", "conflicts", "consistency", "merge", "settle", "similarity", "token_f1",
]

Embed = Callable[[Sequence[str]], Any]
_STEP = re.compile(r"(-?\d+) ([+*-]) (-?\d+) = (-?\d+)")
_OPS: Mapping[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a validator found. ``faulty``: ids whose outputs are at fault; none named = all may be. ``score``: 0..1."""

    ok: bool
    faulty: frozenset[str] = frozenset()
    reason: str = ""
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A whole answer. ``values``: the result of every sub-task that stated one; ``reports``: their texts."""

    answer: str
    values: Mapping[str, str]
    reports: Mapping[str, str]
    consistency: float


def token_f1(a: str, b: str) -> float:
    """F1 of the words of two texts as bags; 1 for two empty ones."""
    x, y = (Counter(re.findall(r"\w+|[^\w\s]", t.lower())) for t in (a, b))
    if not x or not y:
        return float(x == y)
    return 2 * sum((x & y).values()) / (sum(x.values()) + sum(y.values()))


def _extracted(text: str) -> Any:
    """The answer in a text: JSON, or the last value it states, or its only number; None = free text."""
    text = text.strip()
    if text.startswith(("{", "[")):
        try:
            return json.dumps(json.loads(text), sort_keys=True)
        except ValueError:
            return None
    if found := claims(text):
        return list(found.values())[-1]
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
    return numbers[0] if len(numbers) == 1 else None


def similarity(a: str, b: str, *, lam: float = 0.35, embed: Embed | None = None) -> float:
    """sim in [0, 1] of two answers to the same question; symmetric, 1 for equal ones. No ``embed``: lexical."""
    x, y = _extracted(a), _extracted(b)
    lexical = float(x == y) if x is not None and y is not None else token_f1(a, b)
    return _mix(lexical, a, b, lam, embed)


def _mix(lexical: float, a: str, b: str, lam: float, embed: Embed | None) -> float:
    if not 0 <= lam <= 1:
        raise OptionError("lam", lam, "a number from 0 to 1")
    if embed is None or a == b:
        return lexical
    one, two = embed([a, b])
    return (1 - lam) * lexical + lam * min(1.0, max(0.0, float(one @ two)))


def consistency(
    groups: Sequence[Sequence[str]] = (), outputs: Sequence[str] = (), *, lam: float = 0.35, embed: Embed | None = None,
) -> float:
    """CS in [0, 1]. ``groups``: outputs that answer the same question; ``outputs``: of different sub-tasks, compared in
    what they state of the same ids. 1 where nothing can be compared."""
    sims = [
        similarity(a, b, lam=lam, embed=embed) for g in groups for i, a in enumerate(g) for b in g[i + 1 :]
    ]
    stated = [claims(o) for o in outputs]
    for i, a in enumerate(stated):
        for j in range(i + 1, len(stated)):
            if both := a.keys() & stated[j].keys():
                lexical = sum(a[k] == stated[j][k] for k in both) / len(both)
                sims.append(_mix(lexical, outputs[i], outputs[j], lam, embed) if lexical < 1 else 1.0)
    return sum(sims) / len(sims) if sims else 1.0


def conflicts(reports: Mapping[str, Report]) -> dict[str, list[str]]:
    """id -> the different values that reports state of it, its own first; only where they differ."""
    said: dict[str, list[str]] = {}
    for owner in (True, False):
        for r in reports.values():
            for id, value in claims(r.text).items():
                if (id == r.id) == owner and id in reports and not r.failed:
                    values = said.setdefault(id, [])
                    if value not in values:
                        values.append(value)
    return {id: values for id, values in said.items() if len(values) > 1}


async def settle(work: Work, disputed: Mapping[str, Sequence[str]]) -> None:
    """Arbitration: one judge's call with the disputed parts only; what it says of them replaces what was said."""
    graph = work.graph
    ids = [i for i in graph.order if graph.nodes[i].id in disputed]
    if len(ids) == 1:
        id = graph.nodes[ids[0]].id
        return await correct(work, ids[0], disputed[id], role="judge")
    inside = set(ids)
    inputs = sorted({u for i in ids for u, _ in graph.preds[i] if u not in inside})
    before = dict(work.reports)
    said = [f"{i} = {v}" for i, values in disputed.items() for v in values]
    await work.do(ids, [(u, False) for u in inputs], said=said, role="judge")
    for i in ids:
        id = graph.nodes[i].id
        if work.reports[id].failed:
            work.reports[id] = before[id]


async def merge(work: Work, score: float, *, full: bool = False) -> Candidate:
    """One synthesis call where the task says what to do with all results; else they are the answer as they are.

    ``full``: it reads whole reports, not the results alone."""
    graph = work.graph
    values = {r.id: r.value for r in work.reports.values() if r.value is not None}
    texts = {r.id: r.text for r in work.reports.values()}
    if graph.merge is None:
        return Candidate("\n".join(work.reports[o].full for o in graph.outputs), values, texts, score)
    id = merged_id(graph.index)
    reports = [work.reports[n.id] for n in graph.nodes]
    known = [r.full if full else r.short for r in reports]
    if full and not work.desk.fits(agent_text([(id, graph.merge)], known=known), 2 * work.desk.limits.call_tokens):
        known = [r.short for r in reports]
    text = agent_text([(id, graph.merge)], known=known, said=work.doubts([id]))
    after = sorted({r.call for r in work.reports.values()})
    call = await work.desk.ask("synthesis", [id], text, tokens=2 * work.desk.limits.call_tokens, after=after)
    if call.error:
        work.notes.append(f"synthesis failed: {call.error}")
    if id in (found := claims(call.text)):
        values[id] = found[id]
    return Candidate(call.text, values, texts | {id: call.text}, score)


def merged_id(taken: Mapping[str, Any]) -> str:
    """The id of the synthesis: "total" unless a sub-task has it."""
    return next(i for i in ("total", "result", "synthesis") if i not in taken)


def arithmetic(candidate: Candidate) -> Verdict:
    """Checks that need no model: every step written down is true, every input stated is the result of its sub-task,
    and every sub-task has a result that is not missing."""
    faulty: dict[str, str] = {}
    for id, text in candidate.reports.items():
        wrong = [m.group(0) for m in _STEP.finditer(text) if _OPS[m[2]](int(m[1]), int(m[3])) != int(m[4])]
        if wrong:
            faulty[id] = f"{id}: {wrong[0]} is false"
        elif candidate.values.get(id) in (None, MISSING):
            faulty[id] = f"{id} has no result"
        else:
            stale = {k: v for k, v in claims(text).items() if candidate.values.get(k, v) != v}
            if stale:
                faulty[id] = f"{id} used {stale}, which is not what was found"
    if not faulty:
        return Verdict(True, score=1.0)
    score = 1 - len(faulty) / max(1, len(candidate.reports))
    return Verdict(False, frozenset(faulty), "; ".join(faulty.values()), score)
