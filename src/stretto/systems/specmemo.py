"""SpecMemo: what its paper claims, and what is measured here."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping
from typing import Any

from stretto.systems.types import Claim, System

SESSIONS, TURNS, CONTEXT = 4, 8, 768


def evidence(quick: bool) -> Mapping[str, Any]:
    """A chat of 4 sessions and 8 turns by three plans, batches from 1 to 10, and random workloads under a budget."""
    chat = _chat(quick)
    batch = _batches(quick)
    random_loads = _random_workloads(100 if quick else 1000)
    return {
        "claims": [_saving(chat), _batched(batch), _holds(random_loads, chat)], "chat": chat, "batches": batch,
        "random_workloads": random_loads, "seed": 7, "dtype": "float32",
    }


class _Arm:
    """One loaded model and what it remembers of the chat."""

    def __init__(self, name: str, llm: Any, method: str, options: dict[str, Any]):
        self.name, self.llm, self.method, self.options = name, llm, method, options
        self.history: list[list[int]] = [[] for _ in range(SESSIONS)]
        self.seconds: list[float] = []
        self.tokens = 0
        self.texts: list[list[int]] = []

    def turn(self, prompts: list[list[int]]) -> None:
        from stretto.engine.params import SamplingParams

        asked = [h + p for h, p in zip(self.history, prompts, strict=True)]
        start = time.perf_counter()
        outs = self.llm.generate(
            asked, SamplingParams(max_tokens=48, temperature=0.0), method=self.method, options=self.options
        )
        self.seconds.append(time.perf_counter() - start)
        self.history = [a + o.outputs[0].token_ids for a, o in zip(asked, outs, strict=True)]
        self.tokens += sum(len(o.outputs[0].token_ids) for o in outs)
        self.texts += [o.outputs[0].token_ids for o in outs]


def _chat(quick: bool) -> dict[str, Any]:
    """Turn by turn in turns of the arms, so that drift hits all alike."""
    from stretto.decoding.memory import used
    from stretto.llm import LLM
    from stretto.zoo import workbook

    naive_slots = SESSIONS * (1024 + 64)
    naive = LLM("zoo:tiny", kv_cache_tokens=naive_slots, deterministic=True)
    arms = [_Arm("preallocated", naive, "draft", {})]
    draft = naive.method("draft", {}).model.runner
    given = {**used(naive.runner, draft)}
    budget = _naive_bytes(naive, draft, given)
    for share in (0.4,):
        small = LLM("zoo:tiny", kv_cache_tokens=naive_slots, deterministic=True)
        options = {"budget": str(int(share * budget["total"])), "context": CONTEXT, "sequences": 2}
        arms.append(_Arm("specmemo", small, "specmemo", options))
    arms.append(_Arm("plain decoding", LLM("zoo:tiny", kv_cache_tokens=naive_slots, deterministic=True), "ar", {}))
    stream = workbook.stream("test", 7)
    turns = 4 if quick else TURNS
    for turn in range(turns):
        prompts = [workbook.encode(next(stream))[0] for _ in range(SESSIONS)]
        for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
            arm.turn(prompts)
    by = {a.name: a for a in arms}
    ratio = [a / b for a, b in zip(by["preallocated"].seconds, by["specmemo"].seconds, strict=True)]
    method = by["specmemo"].llm.method("specmemo", by["specmemo"].options)
    return {
        "naive": _naive_bytes(naive, draft, dict(used(naive.runner, draft))), "paged": dict(used(naive.runner, draft)),
        "predicted": method.predicted, "used": dict(method.used()), "budget": method.budget,
        "plan": {k: getattr(method.plan, k) for k in ("slots", "rows", "nodes", "draft", "sequences", "context")},
        "throughput": statistics.median(ratio[1:]), "low": min(ratio[1:]), "high": max(ratio[1:]),
        "plain": sum(by["plain decoding"].seconds) / sum(by["specmemo"].seconds),
        "equal": by["specmemo"].texts == by["plain decoding"].texts == by["preallocated"].texts,
        "tokens_per_second": {a.name: a.tokens / sum(a.seconds) for a in arms}, "turns": turns, "sessions": SESSIONS,
        "notes": by["specmemo"].llm.host.notes,
    }


def _naive_bytes(llm: Any, draft: Any, fact: dict[str, int]) -> dict[str, int]:
    """The common plan: both caches allocated for the longest text of every session, logits and activations as used."""
    parts = dict(fact)
    parts["kv"] = llm.runner.pool.nbytes
    parts["draft kv"] = draft.pool.nbytes
    parts["total"] = sum(v for k, v in parts.items() if k != "total")
    return parts


def _batches(quick: bool) -> dict[str, Any]:
    """Tokens a second of specmemo and of plain decoding at batch 1 and 10, on the same prompts."""
    from stretto.bench.compare import compare
    from stretto.bench.measure import Arm
    from stretto.llm import LLM

    tasks, out = ["math_price", "python_select", "list_copy"], {}
    llm, plain = LLM("zoo:tiny"), LLM("zoo:tiny")
    options = {"budget": "24MiB", "context": 160, "sequences": 10}
    arms = [Arm(plain, "zoo:tiny", "ar"), Arm(llm, "zoo:tiny", "specmemo", options)]
    for batch in (1, 10):
        rows = compare(arms, tasks=tasks, each=10, rounds=1 if quick else 3, batch=batch, warm=1)
        out[str(batch)] = {a.label: rows[a.label, "all"].plain() for a in arms}
    return out


def _random_workloads(count: int) -> dict[str, Any]:
    """Random prompts, lengths and cancellations under several budgets; the peak after every workload."""
    from stretto.decoding.memory import least, side_of
    from stretto.engine.params import SamplingParams
    from stretto.errors import OptionError
    from stretto.llm import LLM

    rng, failures, over, worst = random.Random(7), 0, 0, 0.0
    budgets = ("6MiB", "8MiB", "12MiB", "20MiB")
    for size in budgets:
        llm = LLM("zoo:tiny", deterministic=True)
        method = llm.method("specmemo", {"budget": size, "context": 160, "sequences": 2})
        for _ in range(count // len(budgets)):
            streams = []
            for _ in range(rng.randint(1, 5)):
                prompt = [rng.randrange(64, 2000) for _ in range(rng.randint(1, 60))]
                params = SamplingParams(max_tokens=rng.randint(1, 8), temperature=0.0)
                streams += llm.engine.add(prompt, params, method)
            while llm.engine.busy:
                try:
                    llm.engine.step()
                except Exception:
                    failures += 1
                    raise
                if rng.random() < 0.02:
                    llm.engine.abort(rng.choice(streams))
            share = method.used()["total"] / method.budget
            worst, over = max(worst, share), over + (share > 1.0)
    llm = LLM("zoo:tiny")
    side = side_of(llm.runner)
    bound = least(side, None, 160)["total"]
    LLM("zoo:tiny").method("specmemo", {"budget": str(bound), "context": 160})
    try:
        LLM("zoo:tiny").method("specmemo", {"budget": str(bound - side.kv), "context": 160})
        refused = ""
    except OptionError as e:
        refused = str(e)
    return {
        "workloads": count // len(budgets) * len(budgets), "over": over, "failures": failures, "worst_share": worst,
        "bound": bound, "refusal": refused,
    }


def _saving(chat: Mapping[str, Any]) -> dict[str, Any]:
    naive, paged, fact = chat["naive"]["total"], chat["paged"]["total"], chat["used"]["total"]
    less, than_paged = 1 - fact / naive, 1 - fact / paged
    return _claim(
        0, f"{less:.0%} less generation memory at {chat['throughput']:.2f} of the throughput "
        f"({chat['low']:.2f} to {chat['high']:.2f})",
        f"preallocated caches {naive / 2**20:.1f} MiB; the same run by slots in use {paged / 2**20:.1f} MiB",
        less >= 0.6 and chat["throughput"] >= 0.95 and than_paged >= 0.1 and chat["equal"],
        f"{than_paged:.0%} less than slots in use; budget {chat['budget'] / 2**20:.1f} MiB, used {fact / 2**20:.1f} "
        f"of {chat['predicted']['total'] / 2**20:.1f} predicted; {chat['plain']:.2f}x plain decoding; texts "
        f"{'equal' if chat['equal'] else 'NOT equal'}",
    )


def _batched(batch: Mapping[str, Any]) -> dict[str, Any]:
    one, ten = batch["1"]["specmemo"], batch["10"]["specmemo"]
    growth = ten["tokens_per_second"] / one["tokens_per_second"]
    return _claim(
        1, f"x{growth:.1f} from batch 1 to 10; {ten['speedup']:.2f}x batched plain decoding",
        f"plain decoding {batch['10']['ar']['tokens_per_second']:.0f} tokens/s at batch 10", growth >= 3.0,
        f"at batch 1 {one['speedup']:.2f}x plain decoding; one process, no distribution: eight devices are not here",
    )


def _holds(loads: Mapping[str, Any], chat: Mapping[str, Any]) -> dict[str, Any]:
    good = not loads["over"] and not loads["failures"] and bool(loads["refusal"])
    return _claim(
        2, f"{loads['over']} of {loads['workloads']} random workloads over the budget, {loads['failures']} failed; at "
        f"most {loads['worst_share']:.0%}",
        f"bound {loads['bound']} bytes for 160 tokens", good and chat["used"]["total"] <= chat["budget"],
        f"one slot below the bound: {loads['refusal'] or 'not refused'}",
    )


def _claim(i: int, measured: str, baseline: str, holds: bool, note: str) -> dict[str, Any]:
    c = SYSTEM.claims[i]
    return {
        "name": c.name, "paper": c.paper, "measured": measured, "baseline": baseline, "bar": c.bar, "holds": holds,
        "note": note,
    }


SYSTEM = System(
    slug="specmemo",
    title="SpecMemo",
    room="decoding",
    purpose=(
        "Runs speculative decoding inside a memory budget: tree, heads, batch and context are "
        "chosen so that it never runs out."
    ),
    paper="SpecMemo: Speculative Decoding is in Your Pocket, 16 May 2025 (arXiv 2506.01986)",
    claims=(
        Claim(
            name="MT-Bench, 24 GB",
            paper="96 % of the throughput with 65 % less generation memory",
            bar=(
                "60 % less at 95 % of the naive plan's throughput; 10-30 % less than paged K/V "
                "without smaller trees"
            ),
        ),
        Claim(
            name="Llama-2-70B over eight MI250",
            paper="2x over distributed batched plain decoding; x8 at batch 10",
            bar="x3-8 from batch 1 to 10",
        ),
        Claim(
            name="the budget holds",
            paper="a lower bound at which the speed-up is kept",
            bar=(
                "peak at most the budget in 10^3 random workloads; one block below the bound is "
                "refused at start"
            ),
        ),
    ),
    parts=("stretto.decoding.memory", "stretto.decoding.specmemo"),
    command="stretto run zoo:tiny PROMPT --method specmemo -o budget=8MiB -o context=256",
    evidence=evidence,
)
