"""dParallel: what its paper claims, and what is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stretto.systems.types import Claim, System


def evidence(quick: bool) -> Mapping[str, Any]:
    """Base, distilled adapter and control along thresholds; the fastest safe setting of each, chosen elsewhere."""
    from stretto.bench.distilled import (
        against_base,
        certainty,
        describe,
        families_at,
        figures,
        gain,
        items_for,
    )
    from stretto.bench.trial import adapter_ready, claims_of
    from stretto.llm import LLM

    if not adapter_ready("tiny-dparallel"):
        note = "zoo:tiny-dparallel is not there: stretto train tiny-dparallel, then --out into the zoo"
        return {"claims": claims_of(SYSTEM, {c.name: ("not measured", "", False, note) for c in SYSTEM.claims})}
    found = against_base("tiny-dparallel", {"entropy 0.5": {"unmask": "entropy", "threshold": 0.5}}, quick)
    fast = found["trials"]["adapter"][found["chosen"]["adapter"]]
    static = found["trials"]["base"]["static"]
    families, base = families_at(fast, static), f"zoo:{found['base']} at threshold 0.9"
    math, every, code = (figures(found, "adapter", f) for f in ("arithmetic", None, "python"))
    control = figures(found, "control") if "control" in found["trials"] else (0.0, 0.0, 0.0)
    sure = {}
    for role, name in (("base", found["base"]), ("adapter", "tiny-dparallel")):
        llm = LLM(f"zoo:{name}", max_num_seqs=16)
        known = items_for(llm, quick, 9, ("math_price", "list_copy"))
        unseen = items_for(llm, quick, 9, ("line_shuffle", "line_insert_index"))
        sure[role] = {"trained on": certainty(llm, known), "never seen": certainty(llm, unseen)}
    return {
        "claims": claims_of(SYSTEM, {
            "a quarter of the steps": found["quarter"],
            "GSM8K, LLaDA-8B-Instruct": (
                gain(found, "adapter", "arithmetic"), base,
                math[0] >= 1.5 and math[1] >= math[2] - 1,
                "arithmetic",
            ),
            "GSM8K, Dream-7B": (
                gain(found, "adapter"), base,
                every[0] >= 1.2 and every[1] >= every[2] - 1,
                "all tasks together: the zoo has no model with shifted logits",
            ),
            "code, LLaDA": (
                gain(found, "adapter", "python"), base,
                code[0] >= 1.0 and code[1] >= code[2] - 1, "family python",
            ),
            "certainty, not only correctness": (
                f"cross-entropy alone: {control[0]:.2f}x fewer forwards at {control[1]:.1f} %; "
                f"with certainty: {every[0]:.2f}x at {every[1]:.1f} %",
                f"base {every[2]:.1f} %", 1.0 <= control[0] < every[0] and every[1] >= every[2] - 1,
                "the variant that forces all positions is a recipe option (everywhere), not a weight that ships",
            ),
        }),
        "rows": describe(found), "aup": found["aup"], "families_4x": families, "by family": found["families"],
        "certainty": sure, "seed": 5,
    }


SYSTEM = System(
    slug="dparallel",
    title="dParallel",
    room="training",
    purpose=(
        "Makes a diffusion model certain about many tokens at once, so that threshold decoding "
        "needs far fewer forwards."
    ),
    paper="dParallel: Learnable Parallel Decoding for dLLMs, 30 Sep 2025 (ICLR 2026)",
    claims=(
        Claim(
            name="a quarter of the steps",
            paper="256 steps to 24-46, 2 points lost at most (LLaDA, four sets)",
            bar="4x fewer forwards than one token a step, at most 1 point lost, on three families of tasks",
        ),
        Claim(
            name="GSM8K, LLaDA-8B-Instruct",
            paper="256 to 30 steps, 8.5x faster, accuracy 75.7 to 76.1",
            bar="1.5-2.5x fewer forwards than the base at threshold 0.9, accuracy within 1 point",
        ),
        Claim(
            name="GSM8K, Dream-7B",
            paper="39 steps, 6.9x faster, accuracy 82.9 to 82.1",
        ),
        Claim(
            name="code, LLaDA",
            paper="HumanEval 8.2x at 40.2 (38.4); MBPP 10.5x at 40.8 (42.4)",
        ),
        Claim(
            name="certainty, not only correctness",
            paper="consistency distillation at 64 steps reaches only 69.9 on GSM8K",
            bar=(
                "certainty on all positions loses accuracy; cross-entropy alone gives part of the "
                "gain"
            ),
        ),
    ),
    parts=("stretto.training.distill", "stretto.training.self_distill", "stretto.bench.distilled"),
    command="stretto run zoo:tiny-dparallel PROMPT --method diffusion -o unmask=entropy -o threshold=0.5",
    evidence=evidence,
)
