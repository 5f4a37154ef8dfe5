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

__all__ = [
    "STATIC", "TASKS", "against_base", "by_family", "choose", "curve", "describe", "families_at", "items_for",
    "quarter",
]

TASKS = (
    "list_copy", "list_reverse", "math_price", "math_gains", "json_call", "json_batch", "python_select", "python_guard",
    "text_letter", "text_replace", "table_markdown",
)
TAUS = (0.99, 0.95, 0.9, 0.8, 0.6)
STATIC: dict[str, Any] = {"unmask": "fixed"}
DEV_SEED, SEED = 777, 5
PROMPTS = {"tiny-blocks": (24, 52), "tiny-diffusion": (6, 26)}  # a task, for choosing and for measuring

Settings = Mapping[str, Mapping[str, Any]]


def items_for(llm: Any, quick: bool, seed: int = SEED, tasks: Sequence[str] = TASKS, n: int = 24) -> list[Item]:
    return load_items(pick_tasks(list(tasks)), 2 if quick else n, seed, None, llm.tokenizer)


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


def by_family(fast: Trial, alone: Trial, static: Trial) -> dict[str, dict[str, Any]]:
    """family -> accuracy of one token a step, and [fewer forwards, accuracy] of the base at ``alone`` and of ``fast``;
    ``n`` answers a family, each worth 100 / n points."""
    out: dict[str, dict[str, Any]] = {}
    for family in dict.fromkeys(i.family for i in static.items):
        slow = static.of(family)
        figure = lambda t, family=family, slow=slow: [
            round(slow.total("forwards") / t.of(family).total("forwards"), 2), round(100 * t.of(family).accuracy, 1)
        ]
        out[family] = {
            "n": len(slow.items), "one token a step": round(100 * slow.accuracy, 1),
            f"base, {alone.label}": figure(alone), f"method, {fast.label}": figure(fast),
        }
    return out


def quarter(fast: Trial, alone: Trial, static: Trial) -> tuple[str, str, bool, str]:
    """The row of "a quarter of the steps": ``fast`` against the base's one token a step, and how much of it the base
    reaches by the selector ``alone``."""
    mine, base = families_at(fast, static), families_at(alone, static)
    ratio = lambda t: static.total("forwards") / t.total("forwards")
    return (
        f"{ratio(fast):.1f}x fewer forwards at {100 * fast.accuracy:.1f} %; at most one point lost at 4x and more on "
        f"{len(mine)} families ({', '.join(mine) or 'none'})",
        f"one token a step: {100 * static.accuracy:.1f} %",
        len(mine) >= 3,
        f"the base by {alone.label} alone: {ratio(alone):.1f}x at {100 * alone.accuracy:.1f} %, on {len(base)} "
        f"families ({', '.join(base) or 'none'}): what the method adds is {ratio(fast) / ratio(alone):.2f}x and "
        f"{100 * (fast.accuracy - alone.accuracy):+.1f} points",
    )


def against_base(adapter: str, extra: Settings, quick: bool) -> dict[str, Any]:
    """``adapter`` (a zoo name), the plain fine-tuning control and the base, each at its chosen setting and along the
    thresholds: trials by model and setting, choices, figures."""
    from stretto.bench.trial import adapter_ready
    from stretto.llm import LLM
    from stretto.zoo.models import PARTS

    own = PARTS[adapter].base
    out: dict[str, Any] = {"trials": {}, "chosen": {}, "near": {}, "base": own}
    names = {"base": own, "adapter": adapter, "control": "tiny-own-sft"}
    few, many = PROMPTS[own]
    taus = (0.9, 0.6) if quick else TAUS
    floor = near = 0.0  # of accuracy: a point below one token a step, and below the base at threshold 0.9
    for role, name in names.items():
        if role != "base" and not adapter_ready(name):
            continue
        llm = LLM(f"zoo:{name}", max_num_seqs=16)
        settings = {**thresholds(taus), **(extra if role == "adapter" else {})}
        if role == "base":
            settings = {"static": STATIC, **settings}
        dev = curve(llm, items_for(llm, quick, DEV_SEED, n=few), settings)
        if role == "base":
            floor, near = (dev[k].accuracy - 0.01 for k in ("static", "threshold 0.9"))
        several = {k: t for k, t in dev.items() if k != "static"}
        out["chosen"][role], out["near"][role] = (choose(several, f) for f in (floor, near))
        out["trials"][role] = curve(llm, items_for(llm, quick, n=many), settings)
    best = max(t.accuracy for trials in out["trials"].values() for t in trials.values())
    fast, base = out["trials"]["adapter"][out["chosen"]["adapter"]], out["trials"]["base"]
    out["quarter"] = quarter(fast, base[out["chosen"]["base"]], base["static"])
    out["families"] = by_family(fast, base[out["chosen"]["base"]], base["static"])
    out["aup"] = {role: round(aup(points(t), 100 * best), 1) for role, t in out["trials"].items()}
    return out


def describe(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of every curve, for the evidence file."""
    return [
        {"model": role, "chosen": label == found["chosen"][role], **t.row()}
        for role, trials in found["trials"].items() for label, t in trials.items()
    ]


def gain(found: Mapping[str, Any], role: str, family: str | None = None, beside: str = "threshold 0.9") -> str:
    """"1.42x fewer forwards, 95.8 % right (base 95.8 %)", see ``figures``."""
    ratio, mine, base = figures(found, role, family, beside)
    return f"{ratio:.2f}x fewer forwards at {found['near'][role]}, {mine:.1f} % right (base {base:.1f} %)"


def figures(
    found: Mapping[str, Any], role: str, family: str | None = None, beside: str = "threshold 0.9"
) -> tuple[float, float, float]:
    """(forwards saved, accuracy of the model, accuracy of the base), accuracies in per cent: the setting of the model
    that was as good as the base at threshold 0.9 on other prompts, against the base's ``beside``."""
    fast, base = found["trials"][role][found["near"][role]], found["trials"]["base"][beside]
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
