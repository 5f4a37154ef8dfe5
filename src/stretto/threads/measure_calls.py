"""How often a single call of an orchestration is right when everything it is told is right: by task, call and context.

The topologies differ in what an agent reads; so this says which of them suffers from what, without running them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from stretto.engine.params import SamplingParams
from stretto.training.agent_data import cases
from stretto.zoo.pages.orchestra import KINDS, PLAN, TaskCase, agent_text, line_of, solve

__all__ = ["calls", "right_calls"]

Call = tuple[str, str, str, str]  # operation, context, what the agent is told, the right answer


def calls(case: TaskCase) -> Iterator[Call]:
    """The calls of ``case`` with right inputs: each part told its predecessors' results ("direct": parallel, hybrid) or
    all earlier answers in full ("all before": sequential), the lead's plan, and everything in one call."""
    told: dict[str, tuple[str, str]] = {}  # id -> (line, value)
    parts = [*case.subs, *([case.merge] if case.merge else [])]
    for part in parts:
        direct = [u for u, v, _ in case.edges if v == part.id] or (list(told) if part is case.merge else [])
        for context, seen in (("direct", direct), ("all before", list(told))):
            values = {i: told[i][1] for i in seen}
            known = [line_of(i, v) for i, v in values.items()] if context == "direct" else [told[i][0] for i in seen]
            text = agent_text([(part.id, part.text)], known=known)
            yield part.op[0], context, text, solve(part, values, list(values.values()))[0]
        told[part.id] = solve(part, {i: v for i, (_, v) in told.items()}, [v for _, v in told.values()])
    pairs, lines = [(p.id, p.text) for p in parts], "\n".join(line for line, _ in told.values())
    yield "everything", "one call", agent_text(pairs), lines
    if case.kind == "dense":  # the plan of the other kinds says who needs whom, not what comes out
        yield "plan", "lead", agent_text(pairs, order=PLAN), lines


def right_calls(llm: Any, n: int, seed: int) -> dict[str, dict[str, float]]:
    """Share of right answers, greedy, over ``n`` test tasks a kind: "kind" -> "operation, context" -> share."""
    jobs = [(kind, case, call) for kind in KINDS for case in cases("test", kind, n, seed) for call in calls(case)]
    prompts = [
        llm.chat_prompt([{"role": "user", "content": f"{case.common}\n{text}"}]) for _, case, (_, _, text, _) in jobs
    ]
    outs = llm.generate(prompts, SamplingParams(max_tokens=320, temperature=0.0))
    found: dict[str, dict[str, list[bool]]] = {kind: defaultdict(list) for kind in KINDS}
    for (kind, _, (operation, context, _, answer)), out in zip(jobs, outs, strict=True):
        said = [line.strip() for line in out.outputs[0].text.strip().splitlines()]
        found[kind][f"{operation}, {context}"].append(said == answer.splitlines())
    return {kind: {name: sum(r) / len(r) for name, r in rows.items()} for kind, rows in found.items()}
