"""ParallelBench: what its paper claims, and what is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stretto.systems.types import Claim, System

RANDOM = ("replace_random", "insert_random", "remove_random", "shuffle")
KNOWN = ("line_copy", "line_reverse", "list_copy", "list_reverse", "math_price", "json_call", "text_letter")
DECODERS = "static:1,2,4,8;threshold:0.5,0.7,0.9;factor:1.0;freedave:8"


def evidence(quick: bool) -> Mapping[str, Any]:
    """Oracle against closed forms; a model trained here on four operations; decoders swept over what the zoo knows."""
    from stretto.bench import list_model
    from stretto.bench.diffusion_page import compare
    from stretto.bench.trial import claims_of

    cells, worst = _oracle(2_000 if quick else 20_000, (3, 4) if quick else (3, 4, 5, 6, 7, 8))
    model = list_model.train(200 if quick else 700)
    laws = list_model.table(model, 100 if quick else 400)
    flat = _flat(2 if quick else 12)
    score = {(r["operation"], r["k"], r["temperature"]): r["score"] for r in laws}
    easy = min(score[op, k, t] for op in ("copy", "replace_index") for k in (2, 4) for t in (0.0, 1.0))
    falls = [(k, score["shuffle", k, 1.0], _exact(laws, "shuffle", k)) for k in (1, 2, 4)]
    along = all(abs(s - exact) <= 0.12 for _, s, exact in falls) and falls[0][1] > falls[1][1] > falls[2][1]
    same = all(r["same_score"] for r in flat["lossless"])
    return {
        "claims": claims_of(SYSTEM, {
            "bound": (
                f"largest deviation {worst:.2f} sigma over {len(cells)} cells", "closed forms and enumeration",
                worst <= 3,
                f"operations {', '.join(RANDOM)}; one, two and three steps; also real decoders in the engine",
            ),
            "collapse": (
                f"copy and replace-at-index at least {easy:.1%} at 2 and 4 of 4 tokens a step; shuffle at temperature "
                "1: " + ", ".join(f"{s:.1%} at {k} a step (exact {exact:.1%})" for k, s, exact in falls),
                "exact law", False,
                f"at 2 and 4 a step: {'as the bar asks' if easy >= 0.95 and along else 'not so'}; 8 a step, which the "
                "bar asks for too, is not measured: a model of 85,000 parameters trained in this run, lists of four",
            ),
            "no rule adapts": (
                f"lossless methods keep their score at more tokens per forward: {same}; rank correlation of a rule's "
                f"speed with the oracle's over tasks: {flat['adaptivity']}",
                "one token a forward", same, "the zoo cannot do the other list operations, puzzles and writing tasks",
            ),
        }),
        "oracle": cells, "list_model": laws, "sweep": flat, "comparison": compare(quick), "seed": 0,
    }


def _exact(laws: list[Any], operation: str, k: int) -> float:
    return next(r["exact"] for r in laws if (r["operation"], r["k"], r["temperature"]) == (operation, k, 1.0))


def _oracle(draws: int, sizes: tuple[int, ...]) -> tuple[list[dict[str, Any]], float]:
    """Success of decoding an exact model, and the largest deviation from theory in standard errors."""
    import math

    from stretto.bench.oracle import simulate, success_rate
    from stretto.bench.parallel_theory import success

    cells, worst = [], 0.0
    for operation in RANDOM:
        for n in sizes:
            for steps in (1, 2, 3):
                if steps > 1 and n > (6 if operation == "shuffle" else 7):
                    continue  # enumeration of all orders gets long
                p = success(operation, n, steps)
                got = simulate(operation, n, draws, steps, seed=7)
                error = math.sqrt(max(p * (1 - p), 1e-12) / draws)
                z = abs(got - p) / error if p < 1 else abs(got - p) * math.inf if got != p else 0.0
                worst = max(worst, z)
                cells.append({"operation": operation, "n": n, "steps": steps, "exact": p, "measured": got, "z": z})
        p = success(operation, 4, 2)
        got, _ = success_rate(operation, 4, 200, unmask="fixed", steps=2, score="random", cache="none", seed=3)
        z = abs(got - p) / math.sqrt(p * (1 - p) / 200)
        worst = max(worst, z)
        cells.append({"operation": operation, "n": 4, "steps": 2, "exact": p, "measured": got, "z": z, "engine": True})
    return cells, worst


def _flat(n: int) -> dict[str, Any]:
    """A sweep over the tasks that the zoo knows: what lossless methods keep, how far rules adapt."""
    from stretto.bench.parallelbench import sweep_model

    blocks = sweep_model("zoo:tiny-blocks", DECODERS, KNOWN, samples=n, seed=1)
    causal = sweep_model("zoo:tiny", "ar;ngram;suffix", KNOWN, samples=n, seed=1)
    lossless = []
    for result, base, fast in ((blocks, "static 1", ("freedave 8",)), (causal, "ar", ("ngram", "suffix"))):
        points = {(p["decoder"], p["task"]): p for p in result["points"]}
        for name in fast:
            pairs = [(points[base, t], points[name, t]) for t in KNOWN]
            equal = all(a["score"] == b["score"] for a, b in pairs)
            lossless.append({
                "model": result["model"], "decoder": name, "same_score": equal,
                "tokens_per_forward": sum(b["tokens_per_forward"] for _, b in pairs) / len(pairs),
            })
    adaptivity = {k: None if v is None else round(v, 2) for k, v in blocks["decoders"].items()}
    return {
        "points": blocks["points"] + causal["points"], "tasks": blocks["tasks"], "lossless": lossless,
        "adaptivity": adaptivity,
    }


SYSTEM = System(
    slug="parallelbench",
    title="ParallelBench",
    room="bench",
    purpose=(
        "Shows how many tokens at once a decoder may finish on which kind of task before its "
        "answers must get worse."
    ),
    paper=(
        "ParallelBench: Understanding the Trade-offs of Parallel Decoding in Diffusion LLMs, 6 Oct "
        "2025 (ICLR 2026)"
    ),
    claims=(
        Claim(
            name="bound",
            paper="one-step parallel decoding errs by at least the conditional total correlation",
            bar="an oracle meets the closed forms within 3 sigma over 20 000 draws, n = 3 to 8",
        ),
        Claim(
            name="collapse",
            paper=(
                "dLLMs fail tasks that people and autoregressive models solve, as parallelism grows"
            ),
            bar=(
                "copy and replace stay at 95 % with 4 and 8 a step, shuffle falls along the formula"
            ),
        ),
        Claim(
            name="no rule adapts",
            paper="a per-sample best setting would be far better than any tested rule",
            bar="lossless methods are flat: same score at more tokens per forward",
        ),
    ),
    parts=(
        "stretto.bench.parallelbench", "stretto.bench.parallel_tasks", "stretto.bench.parallel_theory",
        "stretto.bench.oracle",
    ),
    command="stretto bench zoo:tiny-blocks --tasks parallelbench --sweep 'threshold:0.5,0.9;static:1,4'",
    evidence=evidence,
)
