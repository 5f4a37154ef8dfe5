"""Learn2PD: what its paper claims, and what is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stretto.systems.types import Claim, System

TASKS = ("list_copy", "list_reverse", "math_price", "json_call", "text_letter", "python_guard")
UNSEEN = ("line_reverse", "line_insert_index")


def evidence(quick: bool) -> Mapping[str, Any]:
    """Static, threshold, filter and oracle on both kinds of models; padding at canvas 64 and 256."""
    from stretto.bench.distilled import by_family, quarter
    from stretto.bench.trial import adapter_ready, claims_of

    rows, by_model = [], {}
    for name, n in (("tiny-blocks", 2 if quick else 100), ("tiny-diffusion", 1 if quick else 20)):
        if adapter_ready(f"{name}-filter"):
            by_model[name] = _selectors(f"zoo:{name}", n, rows)
    padding = _padding(quick)
    if not by_model:
        note = "a filter is not there: stretto train tiny-blocks-filter (and tiny-diffusion-filter), --out into the zoo"
        found = {c.name: ("not measured", "", False, note) for c in SYSTEM.claims}
        found["padding after the end"] = padding
        return {"claims": claims_of(SYSTEM, found), "rows": rows}
    where = max(by_model)  # full attention, with blocks of 32, where its filter is there
    main = by_model[where]
    threshold, filtered, oracle = (main[k] for k in ("threshold 0.9", "filter", "oracle"))
    between = threshold.tokens_per_forward <= filtered.tokens_per_forward <= oracle.tokens_per_forward
    kept = filtered.accuracy >= main["static"].accuracy - 0.01
    ratio = oracle.tokens_per_forward / threshold.tokens_per_forward
    equal = all(m["oracle"].texts == m["static"].texts for m in by_model.values())
    blocks = {k: f"{t.tokens_per_forward:.2f}" for k, t in by_model.get("tiny-blocks", {}).items()}
    parts = {k: quarter(m["filter"], m["threshold 0.9"], m["static"]) for k, m in by_model.items()}
    first = next(iter(parts))
    measured = "; ".join(f"zoo:{k}: {found[0]}" for k, found in parts.items())
    about = "; ".join(f"zoo:{k}: {found[3]}" for k, found in parts.items())
    return {
        "claims": claims_of(SYSTEM, {
            "a quarter of the steps": (measured, parts[first][1], parts[first][2], about),
            "GSM8K, 1024 tokens, LLaDA-8B-Instruct": (
                f"{filtered.tokens_per_forward:.2f} tokens per forward, {100 * filtered.accuracy:.1f} % right",
                f"threshold 0.9: {threshold.tokens_per_forward:.2f}, oracle: {oracle.tokens_per_forward:.2f}; static "
                f"{100 * main['static'].accuracy:.1f} % right", between and kept,
                f"zoo:{where}; on zoo:tiny-blocks (blocks of 8): {blocks}",
            ),
            "oracle that unmasks what is already right": (
                f"{ratio:.2f}x the tokens per forward of threshold 0.9; texts equal the reference: {equal}",
                f"threshold 0.9: {threshold.tokens_per_forward:.2f}", ratio >= 3 and equal,
                "the zoo's models are sure of most tokens at once, so threshold 0.9 is near the oracle already",
            ),
            "padding after the end": padding,
        }),
        "rows": rows, "seed": 21,
        "by family": {k: by_family(m["filter"], m["threshold 0.9"], m["static"]) for k, m in by_model.items()},
    }


def _selectors(model: str, n: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Label -> trial, on the tasks that were recorded; rows also for two that were not."""
    from stretto.bench.trial import trial
    from stretto.bench.workload import load_items, pick_tasks
    from stretto.llm import LLM

    llm = LLM(model, max_num_seqs=16)
    out: dict[str, Any] = {}
    for tasks, where in ((TASKS, "recorded"), (UNSEEN, "not recorded")):
        items = load_items(pick_tasks(list(tasks)), n if tasks is TASKS else min(n, 16), 21, None, llm.tokenizer)
        static = trial(llm, items, "diffusion", {"unmask": "fixed"}, label="static")
        settings: dict[str, dict[str, Any]] = {
            "threshold 0.9": {"threshold": 0.9}, "threshold 0.7": {"threshold": 0.7}, "filter": {"unmask": "filter"},
            "filter 0.9": {"unmask": "filter", "threshold": 0.9},
            "filter 0.99": {"unmask": "filter", "threshold": 0.99},
        }
        found = {k: trial(llm, items, "diffusion", o, label=k) for k, o in settings.items()}
        known = [{"unmask": "oracle", "reference": ",".join(map(str, t))} for t in static.texts]
        found = {"static": static, **found, "oracle": trial(llm, items, "diffusion", known, label="oracle")}
        for t in found.values():
            same = sum(a == b for a, b in zip(t.texts, static.texts, strict=True)) / len(items)
            rows.append({"model": model, "prompts": where, "same_as_static": round(same, 4), **t.row()})
        out = out or found
    return out


def _padding(quick: bool) -> tuple[str, str, bool, str]:
    """The cost of what lies behind the end, on a full-attention model: stop against none and fill."""
    from stretto.bench.trial import trial
    from stretto.bench.workload import load_items, pick_tasks
    from stretto.llm import LLM

    llm = LLM("zoo:tiny-diffusion", max_num_seqs=4)
    items = load_items(pick_tasks(["list_copy", "math_price"]), 1 if quick else 3, 23, None, llm.tokenizer)
    parts, equal, last, wanted = [], True, 1.0, 1.0
    for canvas, rule in ((64, {"threshold": 0.9}), (256, {"threshold": 0.9}), (256, {"unmask": "fixed"})):
        if quick and rule.get("unmask"):
            continue
        runs = {
            how: trial(llm, items, "diffusion", {**rule, "after_end": how}, max_tokens=canvas, batch=2)
            for how in ("stop", "none", "fill")
        }
        equal &= runs["stop"].texts == runs["none"].texts
        last = runs["none"].total("forwards") / runs["stop"].total("forwards")
        answer = runs["stop"].total("tokens") / len(items)
        wanted = canvas / answer
        filled = sum(a == b for a, b in zip(runs["fill"].texts, runs["stop"].texts, strict=True))
        how = "one token a step" if "unmask" in rule else "threshold 0.9"
        parts.append(
            f"canvas {canvas}, {how}: {last:.1f}x fewer forwards (answers of {answer:.0f} tokens), fill gives the same "
            f"text on {filled} of {len(items)}"
        )
    return (
        "; ".join(parts), "decoding the padding too", equal and last >= 0.7 * wanted,
        f"stop and none give the same text: {equal}; with a threshold padding costs few forwards, because a model "
        "trained on it is sure of it",
    )


SYSTEM = System(
    slug="learn2pd",
    title="Learn2PD",
    room="decoding",
    purpose=(
        "Speeds up an untouched diffusion model: a tiny filter learns which predictions are final, "
        "and decoding stops at the end of the text."
    ),
    paper=(
        "Learning to Parallel: Accelerating Diffusion Large Language Models via Learnable Parallel "
        "Decoding, 29 Sep 2025"
    ),
    claims=(
        Claim(
            name="a quarter of the steps",
            paper="up to 22.58x against one token per step, no loss",
            bar="4x fewer forwards than one token a step, at most 1 point lost, on three families of tasks",
        ),
        Claim(
            name="GSM8K, 1024 tokens, LLaDA-8B-Instruct",
            paper="up to 22.58x with no loss, 57.51x with a K/V cache",
            bar="between threshold 0.9 and the oracle in tokens per forward, in distribution",
        ),
        Claim(
            name="oracle that unmasks what is already right",
            paper="more than an order of magnitude",
            bar=(
                "at least 3x the tokens per forward of threshold 0.9; its text equals the "
                "reference by construction"
            ),
        ),
        Claim(
            name="padding after the end",
            paper="up to 90 % of the work at a canvas of 1024",
            bar="stopping at the end gives about canvas / answer at canvas 256, with the same text",
        ),
    ),
    parts=("stretto.training.learn2pd", "stretto.decoding.filter"),
    command="stretto run zoo:tiny-blocks PROMPT --method diffusion -o unmask=filter",
    evidence=evidence,
)
