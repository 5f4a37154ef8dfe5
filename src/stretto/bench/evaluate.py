"""``stretto eval``: how many held-out prompts a model answers right, task by task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stretto.bench.measure import Arm, Item
from stretto.bench.provenance import provenance
from stretto.bench.workload import load_items, pick_tasks
from stretto.errors import OptionError

__all__ = ["evaluate"]


def evaluate(
    model: Any, tasks: str | Sequence[str] = (), *, samples: int = 64, method: str = "ar",
    options: Mapping[str, Any] | None = None, seed: int = 1, batch: int = 16, max_tokens: int | None = None,
    dtype: str = "auto", device: str = "auto", threads: int | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, Any]:
    """Greedy answers to ``samples`` held-out prompts of every task, ``batch`` at a time: accuracy by task and family.

    ``model``: a name, or an ``LLM``. ``method`` "ar" means plain decoding: on a diffusion model, ``diffusion`` at one
    token a forward. ``stderr`` is the binomial standard error.

    Raises InputError for unknown names and absurd numbers.
    """
    for name, value in (("samples", samples), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(name, value, "a whole number from 1")
    chosen = pick_tasks(tasks)
    say = progress or (lambda share, text: None)
    llm = _open(model, batch, dtype, device, threads, say)
    method, options = _plain(llm, method, options)
    arm = Arm(llm, getattr(llm, "model_name", str(model)), method, options)
    rows = []
    for i, task in enumerate(chosen):
        items = load_items([task], samples, seed, max_tokens, llm.tokenizer)
        scores = []
        for start in range(0, samples, batch):
            say((i + start / samples) / len(chosen), task.name)
            scores += _scores(arm, items[start : start + batch])
        rows.append(_row(task.name, task.family, scores))
    say(1.0, "done")
    facts = {"model": arm.model, "method": method, "options": options, "samples": samples, "seed": seed, "batch": batch}
    return {"rows": rows, "families": _families(rows), "provenance": provenance(llm, **facts)}


def _open(
    model: Any, batch: int, dtype: str, device: str, threads: int | None, say: Callable[[float, str], None]
) -> Any:
    if not isinstance(model, str):
        return model
    from stretto.llm import LLM

    say(0.0, f"loading {model}")
    return LLM(model, dtype=dtype, device=device, threads=threads, max_num_seqs=batch)


def _plain(llm: Any, method: str, options: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    if method == "ar" and llm.config.attention != "causal":
        return "diffusion", {"unmask": "fixed", **(options or {})}
    return method, dict(options or {})


def _scores(arm: Arm, items: Sequence[Item]) -> list[float]:
    return [float(i.score(o.outputs[0].text)) for i, o in zip(items, arm.generate(items), strict=True) if i.score]


def _row(task: str, family: str, scores: Sequence[float]) -> dict[str, Any]:
    accuracy = statistics.mean(scores)
    error = math.sqrt(accuracy * (1 - accuracy) / len(scores))
    return {"task": task, "family": family, "accuracy": accuracy, "n": len(scores), "stderr": error}


def _families(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy over all prompts of a family; every task has the same number of them."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["family"], []).append(row)
    return [
        {"family": f, "accuracy": statistics.mean(r["accuracy"] for r in found), "n": sum(r["n"] for r in found)}
        for f, found in groups.items()
    ]
