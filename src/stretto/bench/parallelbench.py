"""ParallelBench: which decoder may finish how many tokens at once on which kind of task.

``samples`` makes the prompts, ``sweep`` runs decoders over them on any model, ``ideal`` says what is possible at all.
"""

from __future__ import annotations

import hashlib
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from stretto.bench import parallel_theory
from stretto.bench.curves import budget, kendall, spearman
from stretto.bench.measure import Item
from stretto.bench.parallel_tasks import PARALLEL_TASKS, Label, ParallelTask
from stretto.decoding.registry import METHODS
from stretto.errors import OptionError, UnknownNameError
from stretto.zoo import workbook

__all__ = [
    "FAMILIES", "GROUP", "Decoder", "Sample", "card_settings", "ideal", "parallel_items", "parse_decoders",
    "pick_parallel", "print_sweep", "samples", "sweep", "sweep_model",
]

GROUP = "parallelbench"  # all of them
LONG = 15  # items of the second set of waiting lines
STYLES = ("plain", "story")
FAMILIES = tuple(dict.fromkeys(t.family for t in PARALLEL_TASKS.values()))


@dataclass(frozen=True, slots=True)
class Sample:
    """One question with what its scorer must know. ``answer``: a right answer where one can be written by rule;
    ``shot``: a solved example of the same task that stands before the question (``story`` style)."""

    task: str
    family: str
    question: str
    label: Label
    answer: str | None
    max_tokens: int
    shot: tuple[str, str] | None = None

    def score(self, text: str, strict: bool = False) -> float:
        return PARALLEL_TASKS[self.task].score(self.label, text, strict)


def seed_of(task: str) -> int:
    """(sha256 of the name + 42) mod 65535: the seed of a task's samples."""
    return (int.from_bytes(hashlib.sha256(task.encode()).digest(), "big") + 42) % 65535


def samples(
    task: str, n: int | None = None, *, style: str = "story", seed: int = 0, size: int | None = None,
) -> list[Sample]:
    """``n`` samples of one task (default: as many as the paper has), lengths in turn; ``size`` fixes the length, 15 for
    the second set. Different ``seed``s give other samples.

    Raises UnknownNameError, OptionError.
    """
    if task not in PARALLEL_TASKS:
        raise UnknownNameError("task", task, PARALLEL_TASKS)
    if style not in STYLES:
        raise OptionError("style", style, f"one of {', '.join(STYLES)}")
    t = PARALLEL_TASKS[task]
    if size is not None and not (2 <= size <= 24 and t.family == "waiting_line"):
        raise OptionError("size", size, "from 2 to 24, for a list task")
    n = t.count if n is None else n
    if n < 1:
        raise OptionError("n", n, "a whole number from 1")
    rng = random.Random(seed_of(task) + 65_537 * seed)
    sizes = (size,) if size else t.sizes
    out: dict[str, Sample] = {}
    while len(out) < n:
        made = _sample(t, rng, sizes[len(out) % len(sizes)], style)
        out.setdefault(made.question, made)
    return list(out.values())


def _sample(t: ParallelTask, rng: random.Random, size: int, style: str) -> Sample:
    shot = None
    if style == "story":
        question, label = t.make(rng, size, style)
        solved = t.example(label)
        shot = (question, solved) if solved is not None and t.family != "writing" else None
    question, label = t.make(rng, size, style)
    return Sample(t.name, t.family, question, label, t.example(label), t.max_tokens, shot)


def pick_parallel(name: str) -> list[ParallelTask]:
    """The tasks that a name means: "parallelbench", a family, or a task; none where it means nothing here."""
    return [t for t in PARALLEL_TASKS.values() if name in (GROUP, t.family, t.name)]


def parallel_items(
    task: ParallelTask, n: int, seed: int, max_tokens: int | None = None, tokenizer: Any = None
) -> list[Item]:
    """Samples as a bench runs them: in the workbook's words for the zoo's tokenizer, else as the paper's chat."""
    zoo = tokenizer is None or _is_zoo(tokenizer)
    return [
        Item(
            s.task, s.family, _prompt(s, tokenizer, zoo), max_tokens or s.max_tokens, partial(s.score), s.question
        )
        for s in samples(task.name, n, style="plain" if zoo else "story", seed=seed)
    ]


def _is_zoo(tokenizer: Any) -> bool:
    return tokenizer.inner.get_vocab() == workbook._tokenizer().get_vocab()


def _prompt(s: Sample, tokenizer: Any, zoo: bool) -> str:
    if zoo:
        return workbook.render(workbook.Example(s.task, s.family, s.question, ""))[0]
    turns = [] if s.shot is None else [("user", s.shot[0]), ("assistant", s.shot[1])]
    turns.append(("user", s.question))
    if tokenizer.templates:
        return tokenizer.chat([{"role": r, "content": c} for r, c in turns], add_generation_prompt=True)
    return "\n".join(c for _, c in turns) + "\n"


@lru_cache(maxsize=512)
def ideal(task: str, n: int, steps: int | None = 1) -> float:
    """The best success rate at temperature 1 of a decoder that draws from exact marginals in ``steps`` steps of random
    order, one token an item; None: one item a step."""
    operation = task.removeprefix("line_")
    return parallel_theory.success("shuffle_other" if operation == "shuffle" else operation, n, steps)


@dataclass(frozen=True, slots=True)
class Decoder:
    """One setting of a sweep."""

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)


RULES = ("threshold", "factor", "entropy", "eb", "dynamic")


def parse_decoders(text: str, block: int = 32) -> list[Decoder]:
    """"threshold:0.5,0.9;static:1,4;freedave:8;ar" -> settings. ``static:k`` decides k tokens a forward in blocks of
    ``block``; a method's name alone means its defaults.

    Raises UnknownNameError for an unknown decoder, OptionError for a dial that is no number.
    """
    out = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        name, _, dials = part.partition(":")
        if name not in (*RULES, "static", *METHODS):
            raise UnknownNameError("decoder", name, [*RULES, "static", *METHODS])
        for dial in filter(None, dials.split(",")) if dials else [""]:
            out.append(_decoder(name, dial, block))
    if not out:
        raise OptionError("decoders", text, "for example threshold:0.5,0.9;static:1,4;freedave:8")
    return out


def _decoder(name: str, dial: str, block: int) -> Decoder:
    try:
        value = float(dial) if dial else 0.0
    except ValueError:
        raise OptionError(name, dial, "numbers, separated by commas") from None
    if name == "static":
        k = max(1, int(value or 1))
        return Decoder(f"static {k}", "diffusion", {"unmask": "fixed", "steps": -(-block // k)})
    if name in RULES:
        dialled = {"threshold": value} if dial else {}
        return Decoder(f"{name} {dial}".strip(), "diffusion", {"unmask": name, **dialled})
    if name == "freedave" and dial:
        return Decoder(f"freedave {dial}", "freedave", {"draft_steps": int(value)})
    return Decoder(name, name, {})


def card_settings(length: int) -> list[Decoder]:
    """The paper's grid for a full-attention model and answers of ``length`` tokens: static unmasking by four scores at
    all pairs of block and steps in powers of two, thresholds and factors by block."""
    powers = [1 << i for i in range(length.bit_length()) if 1 << i <= length]
    out = []
    for b in powers:
        blocks = -(-length // b)
        for s in (s for s in powers if s >= blocks):
            for score in ("random", "confidence", "margin", "neg_entropy"):
                options = {"unmask": "fixed", "steps": s // blocks, "block_length": b, "score": score}
                out.append(Decoder(f"static {score} B{b} S{s}", "diffusion", options))
        for rule, dials in (("threshold", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)), ("factor", (0.7, 1.0, 1.3, 1.6, 1.9))):
            out += [
                Decoder(f"{rule} {d} B{b}", "diffusion", {"unmask": rule, "threshold": d, "block_length": b})
                for d in dials
            ]
    return out


def sweep(
    llm: Any, decoders: Sequence[Decoder], tasks: Sequence[Any], *, n: int = 25, seed: int = 0,
    temperature: float = 0.0, batch: int = 16, items: Mapping[str, Sequence[Item]] | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, Any]:
    """Every decoder on every task: {"points": rows of (decoder, task), "tasks": budgets and the oracle of each,
    "decoders": how far each adapts}. ``items``: other prompts by task, instead of samples."""
    say = progress or (lambda share, text: None)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for i, task in enumerate(tasks):
        prompts = items[task.name] if items else parallel_items(task, n, seed, None, llm.tokenizer)
        for j, d in enumerate(decoders):
            say((i + j / len(decoders)) / len(tasks), f"{task.name}: {d.label}")
            found[d.label, task.name] = _run(llm, d, prompts, temperature, seed, batch)
    points = [_point(decoder, task, records) for (decoder, task), records in found.items()]
    by_task = {t.name: _task_summary(t.name, points, found) for t in tasks}
    return {"points": points, "tasks": by_task, "decoders": _adaptivity(decoders, points, by_task)}


def _run(
    llm: Any, d: Decoder, prompts: Sequence[Item], temperature: float, seed: int, batch: int
) -> list[dict[str, Any]]:
    from stretto.engine.params import SamplingParams

    out = []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        params = [
            SamplingParams(max_tokens=p.max_tokens, temperature=temperature, seed=42 + seed + start + k)
            for k, p in enumerate(chunk)
        ]
        begin = time.perf_counter()
        done = llm.generate([p.prompt for p in chunk], params, method=d.method, options=dict(d.options))
        seconds = (time.perf_counter() - begin) / len(chunk)
        out += [_record(p, o, seconds) for p, o in zip(chunk, done, strict=True)]
    return out


def _record(item: Item, out: Any, seconds: float) -> dict[str, Any]:
    choice, m = out.outputs[0], out.metrics
    places = list(range(len(choice.step_map)))
    return {
        "score": float(item.score(choice.text)) if item.score else 0.0, "forwards": m.forwards, "tokens": m.tokens,
        "kendall": kendall(choice.step_map, places), "spearman": spearman(choice.step_map, places), "seconds": seconds,
    }


def _point(decoder: str, task: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row: scores with their standard error, tokens per forward, how far the order was from left to right."""
    scores = [r["score"] for r in records]
    spread = statistics.pstdev(scores) / math.sqrt(len(scores))
    orders = {k: [r[k] for r in records if r[k] is not None] for k in ("kendall", "spearman")}
    return {
        "decoder": decoder, "task": task, "n": len(records), "score": statistics.mean(scores), "stderr": spread,
        "tokens_per_forward": sum(r["tokens"] for r in records) / sum(r["forwards"] for r in records),
        "forwards": statistics.mean(r["forwards"] for r in records),
        "length": statistics.mean(r["tokens"] for r in records),
        **{k: statistics.mean(v) if v else None for k, v in orders.items()},
        "seconds": statistics.mean(r["seconds"] for r in records),
    }


def _task_summary(
    task: str, points: Sequence[Mapping[str, Any]], found: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Parallel budgets at 80 and 90 per cent, and the oracle: per sample the fastest setting that is still right."""
    curve = [(p["tokens_per_forward"], 100 * p["score"]) for p in points if p["task"] == task]
    runs = [records for (_, name), records in found.items() if name == task]
    best = [
        max((r["tokens"] / r["forwards"] for r in sample if r["score"] >= 1.0), default=None)
        for sample in zip(*runs, strict=True)
    ]
    solved = [b for b in best if b is not None]
    return {
        "budget_80": budget(curve, 80), "budget_90": budget(curve, 90),
        "oracle_tokens_per_forward": statistics.mean(solved) if solved else None,
        "solved_by_some_setting": len(solved) / len(best),
    }


def _adaptivity(
    decoders: Sequence[Decoder], points: Sequence[Mapping[str, Any]], tasks: Mapping[str, Mapping[str, Any]]
) -> dict[str, float | None]:
    """Rank correlation over tasks between a decoder's tokens per forward and the oracle's; None below three tasks."""
    best = {name: t["oracle_tokens_per_forward"] for name, t in tasks.items()}
    out = {}
    for d in decoders:
        pairs = [
            (p["tokens_per_forward"], best[p["task"]])
            for p in points if p["decoder"] == d.label and best[p["task"]] is not None
        ]
        out[d.label] = spearman(*zip(*pairs, strict=True)) if len(pairs) > 2 else None
    return out


def sweep_model(
    model: str, decoders: str, tasks: Sequence[str] = (), *, samples: int = 25, seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, Any]:
    """``sweep`` of a model by name: ``decoders`` as in ``parse_decoders``, or "card" for the paper's grid; ``tasks`` by
    task or family name, of the workbook too (none: all of ParallelBench)."""
    from stretto.bench.provenance import provenance
    from stretto.bench.workload import load_items, pick_tasks
    from stretto.llm import LLM

    llm = LLM(model, max_num_seqs=16, plan=False)  # what counts here are forwards, not seconds
    block = llm.config.block_size if llm.config.attention == "block" else 32
    chosen = card_settings(block) if decoders == "card" else parse_decoders(decoders, block)
    wanted = pick_tasks(list(tasks) or GROUP)
    items = {t.name: load_items([t], samples, seed, None, llm.tokenizer) for t in wanted}
    result = sweep(llm, chosen, wanted, n=samples, seed=seed, items=items, progress=progress)
    facts = {"samples": samples, "seed": seed, "decoders": decoders}
    return {"model": model, **result, "provenance": provenance(llm, **facts)}


def print_sweep(result: Mapping[str, Any]) -> None:
    """The sweep in the terminal: one line a decoder and task, then how far one may go on each task."""
    for p in result["points"]:
        print(
            f"{p['task']:22} {p['decoder']:18} {p['score']:7.1%} ± {2 * p['stderr']:.1%}  "
            f"{p['tokens_per_forward']:6.2f} tokens a forward"
        )
    for task, s in result["tasks"].items():
        most = s["budget_80"]
        print(f"{task}: " + (f"80 % up to {most:.2f} tokens a forward" if most else "80 % nowhere"))
