"""CD4LM: what its paper claims, and what is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stretto.systems.types import Claim, System


def evidence(quick: bool) -> Mapping[str, Any]:
    """Base, distilled adapter and control along thresholds and with CAD; settings chosen on other prompts."""
    from stretto.bench.distilled import STATIC, against_base, describe, families_at, figures, gain, items_for
    from stretto.bench.trial import adapter_ready, claims_of, interleaved
    from stretto.llm import LLM

    if not adapter_ready("tiny-cd4lm"):
        note = "zoo:tiny-cd4lm is not there: stretto train tiny-cd4lm, then --out into the zoo"
        return {"claims": claims_of(SYSTEM, {c.name: ("not measured", "", False, note) for c in SYSTEM.claims})}
    cad = {f"cad {t}": {"unmask": "cad", "threshold": t} for t in (0.95, 0.8)}
    found = against_base("tiny-cd4lm", cad, quick)
    fast, static = found["trials"]["adapter"][found["chosen"]["adapter"]], found["trials"]["base"]["static"]
    families, base = families_at(fast, static), f"zoo:{found['base']} at threshold 0.9"
    math, every, code = (figures(found, "adapter", f) for f in ("arithmetic", None, "python"))
    slow = figures(found, "adapter", None, "static")
    control = figures(found, "control") if "control" in found["trials"] else (0.0, 0.0, 0.0)
    llm = LLM("zoo:tiny-cd4lm", max_num_seqs=1)
    label = found["near"]["adapter"]
    options = cad.get(label) or {"threshold": float(label.split()[-1])}
    seconds = interleaved(
        llm, items_for(llm, True, 13), {"static": ("diffusion", STATIC), "fast": ("diffusion", options)},
        rounds=2 if quick else 3,
    )
    wall = seconds["static"] / seconds["fast"]
    return {
        "claims": claims_of(SYSTEM, {
            "a quarter of the steps": found["quarter"],
            "GSM8K, LLaDA-8B-Instruct": (
                gain(found, "adapter", "arithmetic"), base,
                math[0] >= 1.2 and math[1] >= math[2] - 1,
                "one seed",
            ),
            "code": (
                gain(found, "adapter", "python"), base,
                code[0] >= 1.2 and code[1] >= code[2] - 1, "family python; holds = the lower end of the first bar",
            ),
            "mean over its whole set": (
                f"{slow[0]:.2f}x fewer forwards, {wall:.2f}x wall clock at batch 1, {slow[1]:.1f} % right",
                f"one token per step of the base: {slow[2]:.1f} %", wall >= 2 and slow[1] >= slow[2] - 1, "",
            ),
            "the training matters": (
                f"DSCD {every[0]:.2f}x fewer forwards at {every[1]:.1f} %, plain fine-tuning {control[0]:.2f}x at "
                f"{control[1]:.1f} %", f"base at threshold 0.9: {every[2]:.1f} %",
                every[0] > control[0] and every[1] >= control[1] - 1, "same own answers, same number of steps",
            ),
        }),
        "rows": describe(found), "aup": found["aup"], "families_4x": families, "by family": found["families"],
        "seed": 5,
    }


SYSTEM = System(
    slug="cd4lm",
    title="CD4LM",
    room="training",
    purpose=(
        "Makes a diffusion model keep its accuracy at several tokens per forward, by distilling it "
        "so that long jumps are safe."
    ),
    paper=(
        "CD4LM: Consistency Distillation and aDaptive Decoding for Diffusion Language Models, 5 "
        "Jan 2026"
    ),
    claims=(
        Claim(
            name="a quarter of the steps",
            paper="3.0-5.3x against one token per step, no loss",
            bar="4x fewer forwards than one token a step, at most 1 point lost, on three families of tasks",
        ),
        Claim(
            name="GSM8K, LLaDA-8B-Instruct",
            paper="77.4 to 77.6 % at 5.18x wall clock",
            bar=(
                "1.2-2x the base's tokens per forward at equal accuracy, threshold decoding, 3 "
                "seeds"
            ),
        ),
        Claim(
            name="code",
            paper="HumanEval 38.7 to 40.9 at 3.30x; MBPP 36.9 to 39.0 at 2.96x",
        ),
        Claim(
            name="mean over its whole set",
            paper="3.62x against one token per step",
        ),
        Claim(
            name="the training matters",
            paper="one clean law for every noisy state lets the student skip steps",
            bar="more than plain fine-tuning with the same number of forwards gives",
        ),
    ),
    parts=("stretto.training.distill", "stretto.training.self_distill", "stretto.decoding.unmask"),
    command="stretto run zoo:tiny-cd4lm PROMPT --method diffusion -o unmask=cad",
    evidence=evidence,
)
