"""What ThreadWeaver claims, measured: answers in threads against the same weights, asked to go step by step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stretto.engine.params import SamplingParams
from stretto.models.checkpoint import load
from stretto.outline import Lengths
from stretto.tags import THREADWEAVER
from stretto.threads.threadweaver import weave
from stretto.training import thread_units as units
from stretto.training.p_grpo import PGRPO
from stretto.training.parallel_units import grammar_of
from stretto.training.recipes import find_recipe
from stretto.training.threads_run import policy_steps
from stretto.zoo.models import resolve, training_record
from stretto.zoo.pages.reasoning import Case

__all__ = ["MODEL", "measure"]

MODEL, SEED, MOST = "zoo:tiny-threads", 11, 400
INDEPENDENT = ("rows", "tree")


@dataclass(frozen=True, slots=True)
class Run:
    """One answer to one case."""

    right: bool
    lengths: Lengths
    seconds: float
    forwards: int
    blocks: int = 0
    threads: int = 0
    formed: bool = True


def measure(llm: Any, quick: bool) -> dict[str, Any]:
    """The claims of the paper at our scale; ``llm``: MODEL without prefix cache. See ``systems/threadweaver.py``."""
    n, serial = (8, 4) if quick else (70, 24)
    ways = {"step by step": _flat, "threads": _threads}
    found = {task: units.cases("test", n, SEED, task) for task in INDEPENDENT}
    found["serial"] = units.cases("test", serial, SEED, "serial")
    for way in ways.values():  # kernels, caches of tables
        way(llm, found["rows"][0])
    rows = {task: _in_turns(llm, cases, ways, 1 if quick else 2) for task, cases in found.items()}
    tasks = {task: {w: _summary(r) for w, r in by_way.items()} for task, by_way in rows.items()}
    both = {w: _summary([r for task in INDEPENDENT for r in rows[task][w]]) for w in ways}
    both["threads, share"] = _summary([_threads(llm, c, "share") for t in INDEPENDENT for c in found[t][: n // 4]])
    curves = {k: _policy(k, 3.0 if quick else 16.0, 6 if quick else 48) for k in ("mean", "std")}
    return {
        "claims": _claims(both, tasks, curves), "independent parts": both, "by task": tasks, "policy": curves,
        "of the training": training_record("tiny-threads"), "model": MODEL, "seed": SEED,
        "cases": {t: len(c) for t, c in found.items()},
    }  # fmt: skip


def _flat(llm: Any, case: Case) -> Run:
    prompt, start = units.prompt_of(case, "sequential"), time.perf_counter()
    out = llm.generate([prompt], SamplingParams(max_tokens=MOST, temperature=0.0))[0].outputs[0]
    seconds, ids = time.perf_counter() - start, out.token_ids
    return Run(units.right(case, ids), Lengths(len(ids), len(ids)), seconds, out.metrics.forwards)


def _threads(llm: Any, case: Case, join: str = "reencode") -> Run:
    prompt, start = units.prompt_of(case), time.perf_counter()
    got = weave(llm, prompt, max_tokens=MOST, join=join)
    seconds = time.perf_counter() - start
    seen = units.rollout_of(got, grammar_of(THREADWEAVER))
    right = seen.formed and seen.complete and units.right(case, got.tokens)
    lengths = grammar_of(THREADWEAVER).lengths(got.tokens, tags_serial=True)
    return Run(right, lengths, seconds, got.usage.forwards, len(got.blocks), max(got.blocks, default=0), seen.formed)


def _in_turns(llm: Any, cases: Sequence[Case], ways: dict[str, Any], rounds: int) -> dict[str, list[Run]]:
    """Every case in every way, the ways in turns; the fastest of ``rounds`` counts."""
    out: dict[str, list[Run]] = {name: [] for name in ways}
    for case in cases:
        tries = [{name: way(llm, case) for name, way in ways.items()} for _ in range(rounds)]
        for name, kept in out.items():
            kept.append(min((t[name] for t in tries), key=lambda r: r.seconds))
    return out


def _summary(runs: Sequence[Run]) -> dict[str, float]:
    mean = lambda pick: statistics.mean(pick(r) for r in runs)
    times = [r.seconds for r in runs]
    return {
        "exact": mean(lambda r: r.right), "total": mean(lambda r: r.lengths.total),
        "longest": mean(lambda r: r.lengths.longest), "forwards": mean(lambda r: r.forwards),
        "with a block": mean(lambda r: r.blocks > 0), "threads": mean(lambda r: r.threads),
        "format correct": mean(lambda r: r.formed), "seconds": mean(lambda r: r.seconds),
        "seconds_median": statistics.median(times), "seconds_low": min(times), "seconds_high": max(times),
        "answers": len(runs),
    }


def _policy(normalise: Any, seconds: float, n: int) -> dict[str, Any]:
    """A short run of P-GRPO from the shipped weights; greedy figures on held-out problems before and after."""
    recipe, model = find_recipe("tiny-threads"), load(resolve(MODEL), dtype="float32")
    before, end = _greedy(model, n), time.monotonic() + seconds
    settings = PGRPO(prompts_per_step=4, normalise=normalise, lr=2e-4, length=720, max_tokens=MOST, seed=5)
    steps = list(policy_steps(recipe, model, settings, steps=10_000, clock=lambda: time.monotonic() < end))
    keys = ("accuracy", "longest", "total", "formed")
    return {
        "before": before, "after": _greedy(model, n), "steps": len(steps), "updates": sum(not s.skipped for s in steps),
        "largest advantage": max((abs(a) for s in steps for a in s.advantages), default=0.0),
        "curve": [{k: round(getattr(s, k), 3) for k in keys} for s in steps],
    }


def _greedy(model: Any, n: int) -> dict[str, float]:
    cases = [c for task in INDEPENDENT for c in units.cases("test", n // 2, SEED + 1, task)]
    seen = [r for (r,) in units.roll_out(model, [units.prompt_of(c) for c in cases], 1, 0, temperature=0.0)]
    right = [r.formed and r.complete and units.right(c, r.tokens) for c, r in zip(cases, seen, strict=True)]
    return {
        "accuracy": statistics.mean(right), "longest": statistics.mean(r.longest for r in seen),
        "format correct": statistics.mean(r.formed for r in seen),
    }


def _said(curve: dict[str, Any]) -> str:
    a, b = curve["before"], curve["after"]
    return (
        f"accuracy {a['accuracy']:.3f} to {b['accuracy']:.3f}, longest path {a['longest']:.1f} to {b['longest']:.1f} "
        f"in {curve['updates']} updates; largest advantage {curve['largest advantage']:.2f}"
    )


Figures = dict[str, dict[str, float]]  # way -> what was measured


def _claims(both: Figures, tasks: dict[str, Figures], curves: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    flat, threads, shared = (both[w] for w in ("step by step", "threads", "threads, share"))
    loss = flat["exact"] - threads["exact"]
    path, speed = flat["longest"] / threads["longest"], flat["seconds"] / threads["seconds"]
    shorter, tree = 1 - 1 / path, tasks["tree"]
    tree_path = tree["step by step"]["longest"] / tree["threads"]["longest"]
    mean, std = curves["mean"], curves["std"]
    worse = std["after"]["accuracy"] < mean["after"]["accuracy"] and std["after"]["longest"] < mean["after"]["longest"]
    serial = tasks["serial"]
    return [
        {
            "name": "accuracy, Qwen3-8B, six sets", "paper": "71.9 against 72.2 of the sequential model",
            "measured": f"{threads['exact']:.3f} in threads ({threads['with a block']:.2f} of the answers with a "
                        f"block, {threads['format correct']:.3f} well formed)",
            "baseline": f"{flat['exact']:.3f} by the same weights step by step",
            "bar": "within 1.5 points of the flat model",
            "holds": bool(loss <= 0.015 and flat["exact"] >= 0.5 and threads["with a block"] >= 0.5),
            "note": f"{flat['answers']} held-out problems; serial ones {serial['threads']['exact']:.3f} against "
                    f"{serial['step by step']['exact']:.3f}, with a block {serial['threads']['with a block']:.2f}",
        },
        {
            "name": "critical path", "paper": "15.1k to 13.2k tokens, mean speed-up 1.22",
            "measured": f"{threads['longest']:.1f} of {threads['total']:.1f} tokens, {100 * shorter:.0f} % shorter "
                        f"({path:.2f} x); trees of steps {tree_path:.2f} x",
            "baseline": f"{flat['longest']:.1f} tokens step by step",
            "bar": "20-40 % shorter on the task of products", "holds": bool(shorter >= 0.2),
            "note": "trees of sums and maxima; tags and outlines count; more than 40 % counts too",
        },
        {
            "name": "wall clock, 50 MATH500 problems", "paper": "162.3 to 142.2 s",
            "measured": f"{speed:.2f} x ({1e3 * threads['seconds']:.0f} ms an answer)",
            "baseline": f"{1e3 * flat['seconds']:.0f} ms step by step; {path:.2f} x in tokens",
            "bar": "gain below that in tokens, because of the join", "holds": bool(1 < speed < path),
            "note": f"join by share (joined rows are not evaluated anew) does not suit a model trained for the other: "
                    f"exact {shared['exact']:.3f} of {shared['answers']}",
        },
        {
            "name": "latency on independent parts", "paper": "best problems 3.05 to 3.56 x in tokens",
            "measured": f"{path:.2f} x in tokens, {speed:.2f} x in time, exact {threads['exact']:.3f}",
            "baseline": f"the same weights step by step, exact {flat['exact']:.3f}",
            "bar": "at least 1.5 x, critical path and wall clock, at equal or better accuracy",
            "holds": bool(path >= 1.5 and speed >= 1.5 and loss <= 0), "note": "rows of a table, and trees of steps",
        },
        {
            "name": "advantages are not divided by their spread",
            "paper": "dividing: 74.8 % and an 18.7k path instead of 79.9 % and 16.9k",
            "measured": f"mean-centred: {_said(mean)}",
            "baseline": f"divided: {_said(std)}",
            "bar": "learning curves of both", "holds": bool(worse),
            "note": "holds = dividing shortens the path more and loses accuracy; the same seconds and rollouts' seeds; "
                    "eighty steps of eight prompts from weights of a shorter training did not move accuracy either",
        },
    ]  # fmt: skip
