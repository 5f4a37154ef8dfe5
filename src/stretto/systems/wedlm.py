"""WeDLM: what its paper claims, and what it gives here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="wedlm",
    title="WeDLM",
    room="decoding",
    purpose=(
        "Decodes several tokens per forward under plain causal attention, so that each lands in "
        "the K/V cache at once."
    ),
    paper=(
        "WeDLM: Reconciling Diffusion Language Models with Standard Causal Attention for Fast "
        "Inference, Dec 2025 (arXiv 2512.22737)"
    ),
    parts=("stretto.decoding.wedlm", "stretto.training.recovery"),
    command="stretto run zoo:tiny-wedlm PROMPT --method wedlm",
    claims=(
        Claim(
            name="speed against the AR model in vLLM",
            paper="about 3x on reasoning, up to 10x on counting-like text",
            bar=(
                "2-3 tokens a forward on arithmetic, 4 and more on counting; 1.3-2.5x at batch 1, "
                "gone at 16"
            ),
        ),
        Claim(
            name="low-entropy text at twice the speed",
            paper="1673 / 745 / 198 tokens/s on text of low / medium / high entropy",
            bar="wedlm or block diffusion at least 2x our own ar at batch 1, at most 5 points lost",
        ),
        Claim(
            name="quality",
            paper="base mean 67.21 to 70.84 (7B) and 72.61 to 74.72 (8B); small models lose",
            bar="a few points below the AR control at this size",
        ),
        Claim(
            name="streaming against block-wise",
            paper="up to 1.9x with the same model",
            bar="at least as fast at the same threshold",
        ),
    ),
)


LOW, SUMS = ("list_copy", "text_letter", "text_notice", "json_batch"), ("math_gains", "math_boxes")
MODEL = "zoo:tiny-wedlm"
FAST = {"window": 5, "entropy_threshold": 0.2}  # chosen on prompts of seed 777; narrow, for a CPU
WIDE = {"window": 8, "entropy_threshold": 0.2}


def evidence(quick: bool) -> dict[str, Any]:
    """Speed, tokens a forward and accuracy beside plain decoding of zoo:tiny and of the same weights."""
    from stretto.bench.measure import Arm
    from stretto.zoo.models import MODELS, available

    if MODEL.removeprefix("zoo:") not in available():
        return _absent(f"{MODEL} has no weights here: 'stretto train zoo-tiny-wedlm' makes them")
    from stretto.bench.arms import open_llm

    ours, base = open_llm(MODEL), open_llm("zoo:tiny")
    arms = [
        Arm(base, "zoo:tiny", "ar", label="ar"), Arm(ours, MODEL, "ar", label="same weights, ar"),
        Arm(ours, MODEL, "wedlm", FAST, "wedlm"),
        Arm(ours, MODEL, "wedlm", {**FAST, "streaming": False}, "block-wise"),
        Arm(ours, MODEL, "wedlm", WIDE, "wedlm, wide"),
    ]
    if "tiny-blocks" in available():
        arms.append(Arm(open_llm("zoo:tiny-blocks"), "zoo:tiny-blocks", "diffusion", {}, "blocks"))
    n = 4 if quick else 16
    single = _measured(arms, n, batch=1)
    crowd = _measured(arms[:3], n, batch=16)
    sweep = []
    for w, t in () if quick else [(w, t) for w in (4, 8, 16) for t in (0.2, 0.4, 0.9)]:
        arm = Arm(ours, MODEL, "wedlm", {"window": w, "entropy_threshold": t}, "x")
        sweep.append({"window": w, "threshold": t, **_measured([arms[0], arm], max(2, n // 4), batch=1)["x"]})
    return {"claims": _claims(single, crowd), "batch 1": single, "batch 16": crowd, "sweep": sweep,
            "prompts per task": n, "seed": 11, "models": [m.name for m in MODELS.values() if m.name in available()]}


def _measured(arms: list[Any], n: int, batch: int) -> dict[str, dict[str, Any]]:
    """label -> figures on low-entropy tasks and on sums; speed against the first arm, in turns in the same minutes."""
    from stretto.bench.measure import measure, spread
    from stretto.bench.workload import load_items, pick_tasks

    out: dict[str, dict[str, Any]] = {arm.label: {} for arm in arms}
    for name, tasks in (("low entropy", LOW), ("sums", SUMS)):
        rounds = [load_items([task], n, 11) for task in pick_tasks(list(tasks))]
        measure(arms, [items[:1] for items in rounds], batch=batch)  # warm
        tracks = measure(arms, rounds, batch=batch)
        items = [i for items in rounds for i in items]
        for track in tracks:
            right = [i.score(o.outputs[0].text) for i, o in zip(items, track.outputs, strict=True) if i.score]
            speed, low, high = spread([a / b for a, b in zip(tracks[0].rounds, track.rounds, strict=True)])
            out[track.arm.label][name] = {
                "speed": round(speed, 2), "slowest": round(low, 2), "fastest": round(high, 2),
                "tokens_per_forward": round(track.total("tokens") / max(track.total("forwards"), 1), 2),
                "tokens_per_row": round(track.total("tokens") / max(track.total("rows"), 1), 2),
                "accuracy": round(100 * sum(right) / len(right), 1),
            }
    return out


def _claims(single: dict[str, Any], crowd: dict[str, Any]) -> list[dict[str, Any]]:
    w, alone, twin = single["wedlm"], single["ar"], single["same weights, ar"]
    text, sums = w["low entropy"], w["sums"]
    quick = {k: single[k]["low entropy"] for k in single if k not in ("ar", "same weights, ar")}
    near = {k: v for k, v in quick.items() if v["accuracy"] >= alone["low entropy"]["accuracy"] - 5}
    best = max(near.values(), key=lambda v: v["speed"], default={"speed": 0.0})
    drop = [round(alone[k]["accuracy"] - w[k]["accuracy"], 1) for k in ("low entropy", "sums")]
    stream = round(text["speed"] / single["block-wise"]["low entropy"]["speed"], 2)
    bars = {c.name: c for c in SYSTEM.claims}
    row = lambda name, measured, baseline, holds, note: {
        "name": name, "paper": bars[name].paper, "measured": measured, "baseline": baseline, "bar": bars[name].bar,
        "holds": bool(holds), "note": note,
    }  # fmt: skip
    fast = sums["tokens_per_forward"] >= 2 and text["tokens_per_forward"] >= 4 and text["speed"] >= 1.3
    return [
        row("speed against the AR model in vLLM",
            f"{sums['tokens_per_forward']} tokens a forward on sums, {text['tokens_per_forward']} on low-entropy text; "
            f"{text['speed']}x at batch 1, {crowd['wedlm']['low entropy']['speed']}x at 16",
            "our own ar on zoo:tiny, batch 1 and 16", fast, f"{FAST}, chosen on other prompts"),
        row("low-entropy text at twice the speed",
            "; ".join(f"{k} {v['speed']}x at {v['accuracy']} %" for k, v in quick.items()),
            f"ar on zoo:tiny: {alone['low entropy']['accuracy']} %", best["speed"] >= 2,
            f"medians of rounds in turns; wide: {WIDE}"),
        row("quality", f"{drop[0]} points lost on low-entropy text, {drop[1]} on sums",
            f"ar on zoo:tiny: {alone['low entropy']['accuracy']} and {alone['sums']['accuracy']} %",
            max(drop) <= 5,
            f"ar of the same weights: {twin['low entropy']['accuracy']} and {twin['sums']['accuracy']} %"),
        row("streaming against block-wise", f"{stream}x", "the same model, window and threshold, not refilled",
            stream >= 1, ""),
    ]  # fmt: skip


def _absent(reason: str) -> dict[str, Any]:
    rows = [{"name": c.name, "paper": c.paper, "bar": c.bar, "note": reason} for c in SYSTEM.claims]
    return {"claims": [{**r, "measured": None, "baseline": None, "holds": False} for r in rows]}


SYSTEM = replace(SYSTEM, evidence=evidence)
