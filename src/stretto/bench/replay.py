"""Replay: what the acceptance measured on a small model would give on shapes where bandwidth decides.

Acceptance comes from a bench of real text on a model that can write it; nothing that big and trained is here. The
time comes from the big shape itself, with random weights and a random part of the same kind: a step of the method
there, with as many rows as it verified on average, drafting included, beside a step of plain decoding. Then

    speed-up = tokens per forward (measured on the small model) * seconds of a plain step / seconds of a drafted step

It says what the big shape would gain if its drafter were as often right; larger models are usually easier to draft for.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stretto.bench.peers import SHAPES
from stretto.bench.peers_engines import write_checkpoint
from stretto.bench.provenance import provenance

__all__ = ["BUDGETS", "replay"]

BUDGETS = {  # methods that draft with a part or a model of their own -> the option that bounds their drafts
    "medusa": "num_draft_tokens", "clover": "tree_size", "eagle": "depth", "hidden_transfer": "tree_budget",
    "draft": "num_draft_tokens", "specmemo": "num_draft_tokens",
}
WITH_MODEL = {"draft": {}, "specmemo": {"budget": "1.5GB"}}  # draft with a model of their own
LEAST = 1.2  # tokens per forward below which the method was as good as switched off: there is nothing to replay
FREE = ("ngram", "suffix", "jacobi_forcing")  # their drafting costs microseconds: only rows count
PROMPT, STEPS, WARM = 64, 20, 4


def replay(
    found: Sequence[Mapping[str, Any]], shapes: Sequence[str] = ("125M", "600M"), *, threads: int | None = None,
    steps: int = STEPS, progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """{"rows": [..], "skipped": [..], "provenance"} for bench rows ``found`` (their method, options,
    tokens_per_forward, rows_per_forward). A row: shape, method, rows, tokens_per_forward, plain_ms, step_ms, draft_ms,
    speedup.

    ``draft_ms``: what a step costs beyond a forward of its rows. Draft models are random ones, half as wide as the
    target with a third of its layers, as zoo:tiny-draft is beside zoo:tiny. Methods without such a drafter, and those
    that the planner had switched off, are listed in "skipped".
    """
    say = progress or (lambda text: None)
    rows: list[dict[str, Any]] = []
    skipped, taken = [], []
    for f in found:
        if f["method"] not in (*BUDGETS, *FREE, "ar"):
            skipped.append({"method": f["method"], "reason": "it has no drafter that could be timed at these shapes"})
        elif f["method"] != "ar" and (f.get("tokens_per_forward") or 1) < LEAST:
            skipped.append({"method": f["method"], "reason": "the planner had switched it off"})
        elif f["method"] != "ar":
            taken.append(f)
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="stretto-replay-") as folder:
            say(f"replay: random weights of {shape}")
            llm = _open(write_checkpoint(Path(folder) / "model", SHAPES[shape]), threads)
            draft = write_checkpoint(Path(folder) / "draft", _smaller(SHAPES[shape]))
            plain = _step_seconds(llm, "ar", {}, steps)
            for f in taken:
                say(f"replay: {f['method']} on {shape}")
                rows.append({"shape": shape, **_row(llm, f, plain, steps, draft)})
    return {"rows": rows, "skipped": skipped, "provenance": provenance(shapes=list(shapes), steps=steps)}


def _smaller(config: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of a draft model: half as wide, a third of the layers (zoo:tiny-draft beside zoo:tiny)."""
    halves = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {
        **config, **{name: config[name] // 2 for name in halves},
        "num_hidden_layers": max(1, config["num_hidden_layers"] // 3),
    }


def _row(llm: Any, f: Mapping[str, Any], plain: float, steps: int, draft: Path) -> dict[str, Any]:
    curve, drafts = llm.runner.curve(128), max(1, round(f["rows_per_forward"] - 1))
    if f["method"] in FREE:
        seconds = plain + curve(1 + drafts) - curve(1)
    else:
        own = {"model": str(draft), **WITH_MODEL[f["method"]]} if f["method"] in WITH_MODEL else {}
        budget = drafts + (f["method"] == "hidden_transfer")  # its budget counts all rows of a step
        options = {**(f.get("options") or {}), **own, BUDGETS[f["method"]]: budget}
        seconds = _step_seconds(llm, f["method"], options, steps)
    return {
        "method": f["method"], "model": f.get("model", ""), "rows": 1 + drafts,
        "tokens_per_forward": f["tokens_per_forward"],
        "plain_ms": 1e3 * plain, "step_ms": 1e3 * seconds,
        "draft_ms": 1e3 * max(0.0, seconds - plain - curve(1 + drafts) + curve(1)),
        "speedup": f["tokens_per_forward"] * plain / seconds,
    }


def _open(folder: Path, threads: int | None) -> Any:
    from stretto.llm import LLM

    llm = LLM(
        folder, dtype="bfloat16", device="cpu", threads=threads, enable_prefix_caching=False, plan=False,
        kv_cache_tokens=4096,
    )
    llm.host.parts = lambda kind, name: _random_part(llm, kind)
    return llm


def _random_part(llm: Any, kind: str) -> Any:
    """A part of ``kind`` at its start; as large as a trained one."""
    from stretto.models.adapter import Adapter, Base
    from stretto.training.parts import FrozenNet, make_part

    part = make_part(kind, FrozenNet(llm.model))
    tensors = {n: t.detach().float() for n, t in part.module.state_dict().items()}
    return Adapter(kind, Base.of(llm.model), tensors, part.config)


def _step_seconds(llm: Any, method: str, options: Mapping[str, Any], steps: int) -> float:
    """Median seconds of a step of one sequence, prefill and the first steps left out."""
    from stretto.engine.params import SamplingParams

    params = SamplingParams(max_tokens=4 * (steps + WARM), temperature=0.0, ignore_eos=True)
    (stream,) = llm.submit([7 + i % 500 for i in range(PROMPT)], params, method=method, options=options)
    times = []
    for _ in range(steps + WARM):
        start = time.perf_counter()
        llm.engine.step()
        times.append(time.perf_counter() - start)
        if stream.finish_reason is not None:
            break
    llm.engine.abort(stream)
    return statistics.median(times[WARM:] or times)
