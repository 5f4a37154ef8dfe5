"""Distilled diffusion models beside their base: curves over thresholds, settings chosen on other prompts, families.

A setting is chosen on prompts of another seed than those it is measured on, so that no threshold is fitted to the
figures. Evidence of ``dparallel`` and ``cd4lm``, and of whatever else trains a block diffusion model for speed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from stretto.bench.curves import aup
from stretto.bench.measure import Item
from stretto.bench.trial import Trial, trial
from stretto.bench.workload import load_items, pick_tasks

__all__ = ["STATIC", "TASKS", "against_base", "curve", "describe", "families_at", "choose", "items_for"]

TASKS = (
    "list_copy", "list_reverse", "math_price", "math_gains", "json_call", "json_batch", "python_select", "python_guard",
    "text_letter", "text_replace", "table_markdown",
)
TAUS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
STATIC: dict[str, Any] = {"unmask": "fixed"}
DEV_SEED, SEED = 777, 5

Settings = Mapping[str, Mapping[str, Any]]


def items_for(llm: Any, quick: bool, seed: int = SEED, tasks: Sequence[str] = TASKS) -> list[Item]:
    return load_items(pick_tasks(list(tasks)), 2 if quick else 24, seed, None, llm.tokenizer)


def thresholds(taus: Sequence[float] = TAUS) -> dict[str, dict[str, Any]]:
    return {f"threshold {t}": {"threshold": t} for t in taus}


def curve(llm: Any, items: Sequence[Item], settings: Settings) -> dict[str, Trial]:
    """One trial a setting of method ``diffusion``."""
    return {label: trial(llm, items, "diffusion", o, label=label) for label, o in settings.items()}


def points(trials: Mapping[str, Trial], family: str | None = None) -> list[tuple[float, float]]:
    """(tokens per forward, accuracy in per cent) of each."""
    found = [t.of(family) if family else t for t in trials.values()]
    return [(t.tokens_per_forward, 100 * t.accuracy) for t in found]


def choose(trials: Mapping[str, Trial], floor: float) -> str:
    """The fastest setting whose accuracy is at least ``floor``; the most accurate one where none is."""
    good = [t for t in trials.values() if t.accuracy >= floor]
    if not good:
        return max(trials.values(), key=lambda t: t.accuracy).label
    return max(good, key=lambda t: t.tokens_per_forward).label


def families_at(fast: Trial, static: Trial, *, times: float = 4.0, points_lost: float = 1.0) -> list[str]:
    """The families in which ``fast`` needs at most 1 / ``times`` of the static forwards and loses at most so many
    points of accuracy."""
    out = []
    for family in dict.fromkeys(i.family for i in static.items):
        a, b = fast.of(family), static.of(family)
        fewer = b.total("forwards") / a.total("forwards")
        if fewer >= times and 100 * (b.accuracy - a.accuracy) <= points_lost + 1e-9:
            out.append(family)
    return out


def against_base(adapter: str, extra: Settings, quick: bool) -> dict[str, Any]:
    """``adapter`` (a zoo name), the plain fine-tuning control and the base, each at its chosen setting and along the
    thresholds: trials by model and setting, choices, figures."""
    from stretto.bench.trial import adapter_ready
    from stretto.llm import LLM

    out: dict[str, Any] = {"trials": {}, "chosen": {}}
    names = {"base": "tiny-blocks", "adapter": adapter, "control": "tiny-own-sft"}
    taus = (0.9, 0.6) if quick else TAUS
    floor = 0.0
    for role, name in names.items():
        if role != "base" and not adapter_ready(name):
            continue
        llm = LLM(f"zoo:{name}", max_num_seqs=16)
        settings = {**thresholds(taus), **(extra if role == "adapter" else {})}
        if role == "base":
            settings = {"static": STATIC, **settings}
        dev = curve(llm, items_for(llm, quick, DEV_SEED), settings)
        if role == "base":
            floor = dev["static"].accuracy - 0.01
        out["chosen"][role] = choose({k: t for k, t in dev.items() if k != "static"}, floor)
        out["trials"][role] = curve(llm, items_for(llm, quick), settings)
    best = max(t.accuracy for trials in out["trials"].values() for t in trials.values())
    out["aup"] = {role: round(aup(points(t), 100 * best), 1) for role, t in out["trials"].items()}
    return out


def describe(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of every curve, for the evidence file."""
    return [
        {"model": role, "chosen": label == found["chosen"][role], **t.row()}
        for role, trials in found["trials"].items() for label, t in trials.items()
    ]


def gain(found: Mapping[str, Any], role: str, family: str | None = None, beside: str = "threshold 0.9") -> str:
    """"x1.42 fewer forwards, 95.8 % right (base 95.8 %)" of a model's chosen setting against the base's ``beside``."""
    ratio, mine, base = figures(found, role, family, beside)
    return f"{ratio:.2f}x fewer forwards at {found['chosen'][role]}, {mine:.1f} % right (base {base:.1f} %)"


def figures(
    found: Mapping[str, Any], role: str, family: str | None = None, beside: str = "threshold 0.9"
) -> tuple[float, float, float]:
    """(forwards saved, accuracy of the model, accuracy of the base), accuracies in per cent."""
    fast, base = found["trials"][role][found["chosen"][role]], found["trials"]["base"][beside]
    if family:
        fast, base = fast.of(family), base.of(family)
    return base.total("forwards") / fast.total("forwards"), 100 * fast.accuracy, 100 * base.accuracy


def certainty(llm: Any, items: Sequence[Item]) -> dict[str, Any]:
    """How sure the model is along slow decoding: mean confidence of the masked positions of a block by step, and the
    calibration error of its predictions (ten bins), from the same forwards."""
    from dataclasses import replace

    import numpy as np

    method = llm.method("diffusion", STATIC)
    plain, seen = method.denoiser, []

    def observe(state: Any, c: Any, chosen: Any) -> None:
        seen.append((state.seq, list(state.positions), state.canvas.turn, c.confidence.copy(), c.tokens.copy()))

    method.denoiser = replace(plain, observe=observe)
    try:
        trial(llm, items, "diffusion", STATIC)
    finally:
        method.denoiser = plain
    by_step: dict[int, list[float]] = {}
    sure, right = [], []
    for seq, positions, turn, confidence, tokens in seen:
        by_step.setdefault(turn, []).append(float(confidence.mean()))
        for at, p, token in zip(positions, confidence, tokens, strict=True):
            if at < len(seq.tokens):
                sure.append(float(p))
                right.append(float(seq.tokens[at] == token))
    bins = np.minimum((np.array(sure) * 10).astype(int), 9)
    parts = [
        (bins == b).mean() * abs(np.mean(np.array(sure)[bins == b]) - np.mean(np.array(right)[bins == b]))
        for b in range(10) if (bins == b).any()
    ]
    return {
        "mean_confidence_by_step": [round(statistics.mean(v), 4) for _, v in sorted(by_step.items())],
        "calibration_error": round(float(sum(parts)), 4),
    }
