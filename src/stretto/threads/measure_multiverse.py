"""What Multiverse claims, measured: parallel blocks against the same weights, asked to write step by step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stretto.engine.params import SamplingParams
from stretto.models.context import PackedContext
from stretto.outline import Grammar
from stretto.tags import MULTIVERSE
from stretto.threads.multiverse import Answer, run, run_all
from stretto.training.parallel_units import cases
from stretto.zoo.pages.reasoning import INDEPENDENT, Case, final

__all__ = ["MODEL", "measure"]

MODEL = "zoo:tiny-multiverse"
SEED, BATCH = 11, 8
WAYS: dict[str, dict[str, Any]] = {  # name -> options of ``run``
    "sequential": {"mode": "sequential"},
    "parallel": {"mode": "parallel"},
    "auto": {"mode": "auto"},
    "in_line": {"mode": "parallel", "max_depth": 0},  # the same blocks, paths one behind the other
}
PARAMS = SamplingParams(max_tokens=640, temperature=0.0)


@dataclass(frozen=True, slots=True)
class Run:
    """One answer to one case."""

    task: str
    right: bool
    answer: Answer
    seconds: float


def measure(llm: Any, quick: bool) -> dict[str, Any]:
    """The claims of the paper at our scale; ``llm``: MODEL without prefix cache. See ``systems/multiverse.py``."""
    n, serial = (20, 4) if quick else (160, 24)
    found = cases("test", n, SEED, _weights(*INDEPENDENT))
    single = cases("test", serial, SEED, _weights("serial"))
    for options in WAYS.values():  # kernels, caches of tables
        run(llm, found[0].prompt, PARAMS, **options)
    rows = _in_turns(llm, found, ("sequential", "parallel", "auto"), 1 if quick else 2)
    line = [_one(llm, c, WAYS["in_line"]) for c in found[: 8 if quick else 40]]
    chain = _in_turns(llm, single, ("sequential", "parallel", "auto"), 1)
    batched = _batches(llm, found, 1 if quick else 3)
    summary = {name: _summary(runs) for name, runs in rows.items()}
    summary["in_line"] = _summary(line)
    tasks = {
        task: {n: _summary([r for r in runs if r.task == task]) for n, runs in rows.items()}
        for task in INDEPENDENT if any(c.task == task for c in found)
    }
    serially = {name: _summary(runs) for name, runs in chain.items()}
    budgets = _equal_time(rows["sequential"], rows["parallel"])
    parity = _parity(found[: 3 if quick else 12])
    return {
        "claims": _claims(summary, tasks, serially, batched, budgets),
        "independent parts": summary, "by task": tasks, "serial": serially, f"batch {BATCH}": batched,
        "equal time": budgets, "largest difference of a log-probability, serving against the training mask": parity,
        "model": MODEL, "cases": len(found), "seed": SEED,
    }


def _weights(*tasks: str) -> dict[str, float]:
    return {t: float(t in tasks) for t in (*INDEPENDENT, "serial")}


def _one(llm: Any, case: Case, options: dict[str, Any]) -> Run:
    start = time.perf_counter()
    answer = run(llm, case.prompt, PARAMS, **options)
    return Run(case.task, final(answer.text) == case.answer, answer, time.perf_counter() - start)


def _in_turns(llm: Any, found: Sequence[Case], names: Sequence[str], rounds: int) -> dict[str, list[Run]]:
    """Every case in every way, the ways in turns; the fastest of ``rounds`` counts."""
    out: dict[str, list[Run]] = {name: [] for name in names}
    for case in found:
        tries = [{name: _one(llm, case, WAYS[name]) for name in names} for _ in range(rounds)]
        for name in names:
            out[name].append(min((t[name] for t in tries), key=lambda r: r.seconds))
    return out


def _batches(llm: Any, found: Sequence[Case], rounds: int) -> dict[str, Any]:
    """Seconds an answer with ``BATCH`` prompts at a time, the two ways in turns; the fastest of ``rounds``."""
    groups = [found[i : i + BATCH] for i in range(0, len(found) - BATCH + 1, BATCH)]
    seconds = {"sequential": 0.0, "parallel": 0.0}

    def timed(group: Sequence[Case], name: str) -> float:
        start = time.perf_counter()
        run_all(llm, [c.prompt for c in group], PARAMS, **WAYS[name])
        return time.perf_counter() - start

    for name in seconds:
        timed(groups[0], name)
    for group in groups:
        tries = [{name: timed(group, name) for name in seconds} for _ in range(rounds)]
        for name in seconds:
            seconds[name] += min(t[name] for t in tries)
    return {"seconds": seconds, "speed": seconds["sequential"] / seconds["parallel"], "answers": BATCH * len(groups)}


def _summary(runs: Sequence[Run]) -> dict[str, Any]:
    answers = [r.answer for r in runs]
    times = [r.seconds for r in runs]
    return {
        "exact": statistics.mean(r.right for r in runs),
        "forwards": statistics.mean(a.usage.forwards for a in answers),
        "critical_path": statistics.mean(a.usage.critical_path for a in answers),
        "tokens": statistics.mean(a.usage.generated for a in answers),
        "parallelism": statistics.mean(a.parallelism for a in answers),
        "blocks": statistics.mean(a.blocks for a in answers), "paths": statistics.mean(a.paths for a in answers),
        "malformed": statistics.mean(a.malformed is not None for a in answers),
        "seconds": statistics.mean(times), "seconds_low": min(times), "seconds_high": max(times), "answers": len(runs),
    }


def _equal_time(flat: Sequence[Run], parallel: Sequence[Run]) -> dict[str, Any]:
    """Share of right answers that came within a time: that in which half, 90 % and all of the parallel ones came."""
    times = sorted(r.seconds for r in parallel)
    out = {}
    for share in (0.5, 0.9, 1.0):
        limit = times[min(len(times) - 1, int(share * len(times)))]
        got = {n: statistics.mean(r.right and r.seconds <= limit for r in runs)
               for n, runs in (("sequential", flat), ("parallel", parallel))}
        out[f"{share:.0%}"] = {"seconds": limit, **got}
    return out


def _parity(found: Sequence[Case]) -> float:
    """Largest difference between a log-probability recorded while serving and that of one teacher-forced forward with
    the training's mask and positions, in float32."""
    from stretto.llm import LLM

    llm = LLM(MODEL, dtype="float32", deterministic=True, enable_prefix_caching=False)
    grammar, params, worst = Grammar(MULTIVERSE, llm.tokenizer.inner), replace(PARAMS, logprobs=1), 0.0
    for case in found:
        prompt = llm.tokenizer.encode(llm.chat_prompt([{"role": "user", "content": case.prompt}]))
        done = run(llm, prompt, params)
        if done.malformed is not None:
            continue
        ids = [*prompt, *done.token_ids]
        layout = grammar.layout(ids, start=len(prompt))
        ctx = PackedContext([len(ids)], kind=torch.from_numpy(layout.mask()))
        with torch.inference_mode():
            hidden = llm.model.hidden(torch.tensor(ids), torch.from_numpy(layout.positions), ctx)
            law = torch.log_softmax(llm.model.logits(hidden).double(), -1)
        for i, seen in enumerate(done.logprobs or [], len(prompt)):
            if seen is not None:
                worst = max(worst, abs(seen[ids[i]] - float(law[i - 1, ids[i]])))
    return worst


def _claims(
    every: dict[str, Any], tasks: dict[str, Any], serial: dict[str, Any], batched: dict[str, Any],
    budgets: dict[str, Any],
) -> list[dict[str, Any]]:
    flat, parallel, line = every["sequential"], every["parallel"], every["in_line"]
    as_right = flat["exact"] - parallel["exact"] <= 0.02 and flat["exact"] >= 0.5
    fewer, speed = flat["forwards"] / parallel["forwards"], flat["seconds"] / parallel["seconds"]
    path = flat["critical_path"] / parallel["critical_path"]
    by_task = ", ".join(
        f"{t} {v['sequential']['exact']:.2f} -> {v['parallel']['exact']:.2f}" for t, v in tasks.items()
    )
    speeds = ", ".join(f"{t} {v['sequential']['seconds'] / v['parallel']['seconds']:.2f}" for t, v in tasks.items())
    most = budgets["90%"]
    return [
        {
            "name": "accuracy, 32B", "paper": "AIME24 53.8, AIME25 45.8 against 54.6 and 45.0 flat",
            "measured": f"exact {parallel['exact']:.3f} in parallel, {every['auto']['exact']:.3f} where the model "
                        f"decides; malformed {parallel['malformed']:.3f}",
            "baseline": f"the same weights, step by step: exact {flat['exact']:.3f}",
            "bar": "exact match within 1-2 points of the flat model", "holds": bool(as_right),
            "note": f"holds = at most 2 points lower, of a model that solves at least half; {parallel['answers']} "
                    f"held-out problems with independent parts; {by_task}. The flat model is the same weights in the "
                    "other mode, not a second training",
        },
        {
            "name": "degree of parallelism", "paper": "1.15-1.18 on reasoning",
            "measured": f"{fewer:.2f} x fewer forwards ({parallel['forwards']:.1f}), critical path {path:.2f} x "
                        f"shorter, degree {parallel['parallelism']:.2f}, {parallel['paths']:.1f} paths an answer",
            "baseline": f"step by step: {flat['forwards']:.1f} forwards; the same blocks in line "
                        f"{line['forwards']:.1f}",
            "bar": "1.5-3x fewer forwards on data with independent sub-results", "holds": bool(fewer >= 1.5),
            "note": f"serial problems: {serial['parallel']['blocks']:.2f} blocks an answer when asked for parallel, "
                    f"{serial['auto']['blocks']:.2f} when the model decides",
        },
        {
            "name": "speed", "paper": "up to 2x for highly parallel outputs, batch 1-128",
            "measured": f"{speed:.2f} x at batch 1 ({1e3 * parallel['seconds']:.1f} ms an answer), "
                        f"{batched['speed']:.2f} x at batch {BATCH}",
            "baseline": f"step by step: {1e3 * flat['seconds']:.1f} ms",
            "bar": "wall clock gain somewhat below that in forwards",
            "holds": bool(speed >= 1.5 and path >= 1.5 and as_right),
            "note": "holds = at least 1.5 in critical path and wall clock at batch 1, accuracy within 2 points; "
                    f"{speeds}; serial problems {serial['sequential']['seconds'] / serial['parallel']['seconds']:.2f}",
        },
        {
            "name": "equal time", "paper": "+1.87 % on average",
            "measured": f"{100 * (most['parallel'] - most['sequential']):+.1f} points within "
                        f"{1e3 * most['seconds']:.0f} ms (nine of ten parallel answers came)",
            "baseline": f"step by step: {most['sequential']:.3f} right within that time", "bar": "",
            "holds": bool(most["parallel"] > most["sequential"]),
            "note": "; ".join(
                f"when {k} came: {v['parallel']:.3f} against {v['sequential']:.3f}" for k, v in budgets.items()
            ),
        },
    ]
