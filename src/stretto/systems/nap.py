"""NAP: what its paper claims, and what it gives here."""

from __future__ import annotations

import random
import re
import time
from dataclasses import replace
from typing import Any

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="nap",
    title="NAP",
    room="decoding",
    purpose=(
        "Makes a diffusion model reason on several independent paths in every forward, and tells "
        "how sequential a decoder really is."
    ),
    paper=(
        "Why Diffusion Language Models Struggle with Truly Parallel (Non-Autoregressive) "
        "Decoding?, Feb 2026 (arXiv 2602.23225)"
    ),
    parts=("stretto.decoding.streams", "stretto.bench.arness", "stretto.training.paths"),
    command="stretto run MODEL PROMPT --method streams -o streams=3",
    claims=(
        Claim(
            name="diagnosis",
            paper=(
                "global ARness@1 of free order: LLaDA-8B 0.73, Dream-7B 0.92; after fine-tuning "
                "0.81 and 0.93"
            ),
            bar="lower ARness than single-chain decoding; exactly 1 for an autoregressive order",
        ),
        Claim(
            name="GSM8K, Dream, 1 / 2 / 3 / 4 tokens a step",
            paper="83.6 / 79.2 / 70.9 / 60.9 against 78.0 / 66.8 / 56.9 / 46.5",
            bar="near equality at 1 a step, several points ahead from 3 a step",
        ),
        Claim(
            name="GSM8K, LLaDA",
            paper="84.1 / 82.6 / 63.3 / 56.1 against 83.5 / 82.0 / 60.9 / 54.1",
        ),
    ),
)


STREAMS, PATH, SUMMARY = 3, 26, 8
BASE = "zoo:tiny-diffusion"


def evidence(quick: bool) -> dict[str, Any]:
    """Two models trained here and now from zoo:tiny-diffusion on the same paths: as streams, and as one chain."""
    from stretto.zoo.workbook import examples

    seconds = 3 if quick else 24
    tests = examples("math_boxes", "test", 8 if quick else 12, 21)
    order = _order(quick)
    arms = {kind: _trained(kind, seconds) for kind in ("streams", "chain")}
    table = {
        kind: {k: _decoded(model, kind, k, tests) for k in ((1, 3) if quick else (1, 2, 3, 4, 6))}
        for kind, (model, _) in arms.items()
    }
    return {
        "claims": _claims(order, table), "order": order, "decoding": table,
        "training": {k: r for k, (_, r) in arms.items()},
        "seconds of training": seconds, "seed": 21, "prompts": len(tests),
    }  # fmt: skip


def _ids() -> dict[str, int]:
    from stretto.zoo import workbook

    t = workbook._tokenizer()
    names = {"open": "<Path>", "close": "</Path>", "summary": "<Conclusion>", "end": "<|im_end|>"}
    return {k: t.token_to_id(v) for k, v in names.items()}


def _layout() -> Any:
    from stretto.training.paths import PathLayout

    return PathLayout(**_ids(), streams=STREAMS, length=PATH, summary_length=SUMMARY)


def _document(example: Any, kind: str, rng: random.Random) -> Any:
    """A word problem with three orders of its solution: between tags, or one after the other as a single chain."""
    from stretto.training.data import Document
    from stretto.training.paths import orders_of
    from stretto.zoo import workbook

    layout, tokenizer = _layout(), workbook._tokenizer()
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    numbers = [int(x) for x in re.findall(r"\d+", example.prompt)]
    paths = [encode(p) for p in rng.sample(orders_of(numbers, [1, 1, 1]), STREAMS)] if len(set(numbers)) == 3 else None
    prompt, _ = workbook.encode(example)
    if paths is None or max(map(len, paths)) > PATH:
        return None
    answer = encode(f"Answer: {sum(numbers)}")
    if kind == "streams":
        return layout.document(prompt, paths, answer)
    text = [t for p in paths for t in [*p, *encode("\n")]] + answer
    return Document([*prompt, *text, *[layout.end] * (layout.places - len(text))], len(prompt))


def _trained(kind: str, seconds: float) -> tuple[Any, dict[str, Any]]:
    """The base after ``seconds`` on one kind of document, the same questions and the same number of places."""
    from stretto.models.checkpoint import load
    from stretto.training.data import PackedData
    from stretto.training.nets import PackedNet
    from stretto.training.objectives import MaskedDiffusion
    from stretto.training.trainer import TrainConfig, Trainer
    from stretto.zoo import workbook

    model = load(BASE, dtype="float32")
    mask = model.config.mask_token_id
    assert mask is not None and model.config.pad_token_id is not None

    def pool(k: int) -> list[Any]:
        rng = random.Random(k)
        found = (_document(e, kind, rng) for e in workbook.examples("math_boxes", "train", 192, 1000 + k))
        return [d for d in found if d is not None]

    data = PackedData(pool, rows=12, length=160, pad_id=model.config.pad_token_id, seed=0)
    config = TrainConfig(minutes=seconds / 60, lr=2e-3, adam_lr=1e-3, warmup=5, decay=0.5)
    record = Trainer(model, PackedNet(model), MaskedDiffusion(mask, law="count", suffix=0.5), data, config).run()
    return model.eval(), {"steps": record.step, "tokens": record.tokens, "loss": round(record.loss, 4)}


def _decoded(model: Any, kind: str, k: int, tests: list[Any]) -> dict[str, Any]:
    """Accuracy, forwards and order at ``k`` tokens a forward on a canvas of the same places."""
    import copy

    from stretto.bench.arness import global_arness, order_of
    from stretto.decoding.registry import make
    from stretto.engine.engine import Engine
    from stretto.engine.host import Host
    from stretto.engine.params import SamplingParams
    from stretto.engine.runner import Runner
    from stretto.zoo import workbook

    layout, tokenizer = _layout(), workbook._tokenizer()
    runner = Runner(copy.deepcopy(model), slots=8192)
    host = Host(runner, (layout.end,), 1024, plan=False)
    engine = Engine(runner, host, max_rows=4096, max_seqs=24)
    options: dict[str, Any] = {"tokens_per_step": k, "streams": 1, "stream_length": layout.places}
    if kind == "streams":
        tags = {name: getattr(layout, name) for name in ("open", "close", "summary")}
        options = {"tokens_per_step": k, "streams": STREAMS, "stream_length": PATH, **tags}
    method = make("streams", host, options)
    params = SamplingParams(max_tokens=layout.places, temperature=0.0)
    begun = [engine.add(workbook.encode(e)[0], params, method)[0] for e in tests]
    start = time.perf_counter()
    while engine.busy:
        engine.step()
    seconds, right, order = time.perf_counter() - start, 0, []
    for example, stream in zip(tests, begun, strict=True):
        text = tokenizer.decode(stream.seq.tokens[stream.seq.prompt_len :], skip_special_tokens=True)
        found = re.findall(r"Answer: (\d+)", text)
        right += bool(found) and int(found[-1]) == sum(int(x) for x in re.findall(r"\d+", example.prompt))
        order.append(global_arness(order_of(stream.seq.step_map)))
    forwards = sum(s.seq.metrics.forwards for s in begun) / len(begun)
    return {"accuracy": round(100 * right / len(tests), 1), "forwards": round(forwards, 1),
            "seconds": round(seconds, 2), "arness": round(sum(order) / len(order), 3)}  # fmt: skip


def _order(quick: bool) -> dict[str, float]:
    """Global ARness@1 of the shipped models on all kinds of tasks: free order, and plain decoding."""
    from stretto.bench.arness import global_arness, order_of
    from stretto.bench.workload import load_items, one_per_family
    from stretto.engine.params import SamplingParams
    from stretto.llm import LLM

    items = load_items(one_per_family(), 1 if quick else 4, 21)
    runs = {
        "zoo:tiny, plain": ("zoo:tiny", "ar", {}),
        "zoo:tiny-diffusion, free order":
            (BASE, "diffusion", {"unmask": "fixed", "block_length": 256, "cache": "none"}),
        "zoo:tiny-diffusion, random order":
            (BASE, "diffusion", {"unmask": "fixed", "score": "random", "block_length": 256, "cache": "none"}),
    }  # fmt: skip
    out = {}
    for name, (model, method, options) in runs.items():
        llm = LLM(model, enable_prefix_caching=False)
        params = [SamplingParams(max_tokens=i.max_tokens, temperature=0.0) for i in items]
        streams = [
            llm.submit(i.prompt, p, method=method, options=options)[0] for i, p in zip(items, params, strict=True)
        ]
        while llm.engine.busy:
            llm.engine.step()
        found = [global_arness(order_of(s.seq.step_map)) for s in streams]
        out[name] = round(sum(found) / len(found), 3)
    return out


def _claims(order: dict[str, float], table: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    bars = {c.name: c for c in SYSTEM.claims}

    def row(name: str, measured: Any, baseline: Any, holds: bool, note: str = "") -> dict[str, Any]:
        c = bars[name]
        return {"name": name, "paper": c.paper, "measured": measured, "baseline": baseline, "bar": c.bar,
                "holds": bool(holds), "note": note}  # fmt: skip

    ours, chain = table["streams"], table["chain"]
    show = lambda t: " / ".join(f"{t[k]['accuracy']:.0f}" for k in sorted(t))
    late = [ours[k]["accuracy"] - chain[k]["accuracy"] for k in ours if k >= 3]
    plain = next(iter(order.values()))
    able = min(ours[1]["accuracy"], chain[1]["accuracy"]) >= 50
    short = "sums of three numbers, after the seconds of training below"
    if not able:
        short += ": not enough to learn the layout (under 50 % at one a step), so nothing is compared"
    return [
        row("diagnosis", f"ARness@1 {ours[1]['arness']} (streams)",
            f"{chain[1]['arness']} (one chain); base in free order "
            f"{order['zoo:tiny-diffusion, free order']}, plain {plain}",
            plain == 1.0 and ours[1]["arness"] < chain[1]["arness"]),
        row("GSM8K, Dream, 1 / 2 / 3 / 4 tokens a step", f"{show(ours)} % at {'/'.join(map(str, sorted(ours)))} a step",
            f"{show(chain)} % as one chain, the same tokens and places",
            able and abs(ours[1]["accuracy"] - chain[1]["accuracy"]) <= 5 and min(late) >= 3, short),
        row("GSM8K, LLaDA", f"{show(ours)} %: the base is of LLaDA's kind, full attention without shift",
            f"{show(chain)} %", able and min(late) >= 0, short),
    ]  # fmt: skip


SYSTEM = replace(SYSTEM, evidence=evidence)
