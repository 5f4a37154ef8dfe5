"""PPD: what its paper claims, and what is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stretto.systems.types import Claim, System

TEMPLATED = ("arithmetic", "json", "python", "tables", "text")
BUDGETS = (8, 16, 32)


def evidence(quick: bool) -> Mapping[str, Any]:
    """ppd on zoo:tiny beside ar, by budget and by what the planner chooses; inside a draft model; ensembles."""
    from stretto.bench.compare import compare
    from stretto.bench.measure import Arm
    from stretto.errors import StrettoError
    from stretto.llm import LLM
    from stretto.models.adapter import open_adapter
    from stretto.training.slot_study import Study

    llm, free = LLM("zoo:tiny"), LLM("zoo:tiny", plan=False)
    arms = [
        Arm(llm, "zoo:tiny", "ar"), Arm(llm, "zoo:tiny", "ppd"), Arm(llm, "zoo:tiny", "draft"),
        Arm(llm, "zoo:tiny", "draft", {"draft_method": "ppd"}, "draft with ppd"),
        Arm(free, "zoo:tiny", "ar", {}, "ar again"), Arm(free, "zoo:tiny", "ppd", {}, "ppd unplanned"),
        *(Arm(free, "zoo:tiny", "ppd", {"tree_budget": b}, f"ppd {b} rows") for b in BUDGETS),
    ]
    found = compare(arms, each=1 if quick else 2, rounds=2 if quick else 3)
    adapter = open_adapter("ppd", "auto", llm.model)
    try:
        medusa = open_adapter("medusa", "auto", llm.model)
    except StrettoError:
        medusa = None
    study, steps = Study(examples=96 if quick else 192, tests=1 if quick else 3), 8 if quick else 30
    ensembles = {
        m: [[round(sum(row[:top]), 4) for top in (1, 5, 10)] for row in study.acceptance(
            study.trained("ppd", steps, tokens=3, members=m, cuts=24 // m))]
        for m in ((1, 4) if quick else (1, 4, 16))
    }
    c = llm.config
    own_head = c.hidden_size * (c.hidden_size + c.vocab_size)
    return {
        "claims": [
            _speed(found), _size(adapter, medusa, own_head), _distant(adapter.statistics, medusa, ensembles, steps),
            _draft(found),
        ],
        "rows": [row.plain() for row in found.values()], "ensembles": ensembles, "parameters": adapter.parameters,
        "extra_bytes": 2 * adapter.parameters, "seed": 11, "dtype": "auto",
    }


def _speed(found: Mapping) -> dict[str, Any]:
    rows = {f: found["ppd", f] for f in (*TEMPLATED, "lists", "all")}
    raw = {f: found["ppd unplanned", f].per_forward for f in (*TEMPLATED, "lists", "all")}
    swept = {b: found[f"ppd {b} rows", "all"] for b in BUDGETS}
    base = found["ar again", "all"].speedup
    good = [f for f in TEMPLATED if raw[f] >= 1.4]
    fast = [f for f in (*TEMPLATED, "lists") if rows[f].speedup >= 1.1]
    equal = min(row.equal for row in found.values())
    return _claim(
        0, f"{raw['all']:.2f} tokens a step over all tasks; planned {rows['all'].speedup:.2f}x "
        f"({rows['all'].low:.2f} to {rows['all'].high:.2f}); " + ", ".join(f"{f} {raw[f]:.2f}" for f in TEMPLATED),
        "ar, same run; fixed budgets: " + ", ".join(
            f"{b} rows {r.per_forward:.2f} and {r.speedup / base:.2f}x" for b, r in swept.items()),
        len(good) == len(TEMPLATED) and rows["all"].speedup >= 1.1,
        f"1.4 tokens a step or more on {', '.join(good) or 'no family'}, 1.1x or more on "
        f"{', '.join(fast) or 'no family'}; texts equal to ar: {equal:.0%}",
    )


def _size(adapter: Any, medusa: Any, own_head: int) -> dict[str, Any]:
    heads = adapter.config["tokens"] * own_head
    shared = "" if medusa is None else f"; our heads share the LM head: {medusa.parameters} numbers"
    return _claim(
        1, f"{adapter.parameters} numbers, {2 * adapter.parameters} bytes",
        f"Medusa's heads with their own vocabularies at this width: {heads} numbers{shared}",
        heads >= 1000 * adapter.parameters, f"{heads / adapter.parameters:.0f} times smaller",
    )


def _distant(statistics: Mapping, medusa: Any, ensembles: Mapping, steps: int) -> dict[str, Any]:
    ours = [[sum(row[:top]) for top in (1, 5, 8)] for row in statistics["acceptance"]]
    theirs = [] if medusa is None else [[sum(r[:top]) for top in (1, 5, 8)] for r in medusa.statistics["acceptance"]]
    far = [a[2] - b[2] for a, b in zip(ours[1:], theirs[1:], strict=False)]
    table = "; ".join(f"{m} members: {x}" for m, x in ensembles.items())
    return _claim(
        2, "top 1, 5, 8 by distance, given those before: "
        + "; ".join(" ".join(f"{x:.2f}" for x in row) for row in ours),
        "no Medusa heads here" if medusa is None
        else "Medusa heads: " + "; ".join(" ".join(f"{x:.2f}" for x in row) for row in theirs),
        bool(far) and min(far) > 0,
        f"{statistics.get('minutes')} minutes of training for {len(ours)} vectors"
        + ("" if medusa is None else f", Medusa {medusa.statistics.get('minutes')}")
        + f"; ensembles after {steps} steps, top 1, 5, 10 by distance: {table}",
    )


def _draft(found: Mapping) -> dict[str, Any]:
    plain, ahead = found["draft", "all"], found["draft with ppd", "all"]
    return _claim(
        3, f"{ahead.speedup / plain.speedup:.2f}x the plain draft: {ahead.speedup:.2f}x ar",
        f"draft {plain.speedup:.2f}x ar, same run", ahead.speedup > plain.speedup,
        "the draft hands over the same chain in fewer forwards, each through Python; the plain draft's lone chain "
        f"grows in C, and a forward of zoo:tiny-draft is short beside either; texts equal to ar: {ahead.equal:.0%}",
    )


def _claim(i: int, measured: str, baseline: str, holds: bool, note: str) -> dict[str, Any]:
    c = SYSTEM.claims[i]
    return {
        "name": c.name, "paper": c.paper, "measured": measured, "baseline": baseline, "bar": c.bar,
        "holds": bool(holds), "note": note,
    }


SYSTEM = System(
    slug="ppd",
    title="PPD",
    room="decoding",
    purpose=(
        "Finishes several tokens per forward with an adapter of a few embedding vectors: trained "
        "prompt tokens guess ahead. Lossless."
    ),
    paper=(
        "Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM "
        "Inference, May 2024 (arXiv 2405.18628)"
    ),
    claims=(
        Claim(
            name="speed",
            paper="up to 2.49x; Vicuna-7B 39.2 to 88.0 tokens/s, Medusa 82.0",
            bar="1.4-2.2 tokens a step, 1.1-1.7x wall clock at batch 1",
        ),
        Claim(
            name="size",
            paper="0.0002 % of the parameters; 0.004 % of Medusa's extra memory",
            bar="above 1000 times smaller than Medusa",
        ),
        Claim(
            name="distant tokens",
            paper="up to 28 % higher acceptance than independent heads",
            bar="top-k accuracy per distance against Medusa heads of equal training time",
        ),
        Claim(
            name="on top of a draft",
            paper="up to 1.22x more",
        ),
    ),
    parts=(
        "stretto.decoding.ppd", "stretto.decoding.slotted", "stretto.decoding.slots",
        "stretto.decoding.ahead", "stretto.training.slot_rows",
    ),
    command="stretto run zoo:tiny PROMPT --method ppd",
    evidence=evidence,
)
