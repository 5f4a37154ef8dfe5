"""FreeDave: what its paper claims, and what is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stretto.systems.types import Claim, System

TASKS = ("list_copy", "list_reverse", "math_price", "json_call", "text_letter")
DEPTHS = (1, 2, 4, 8)


def evidence(quick: bool) -> Mapping[str, Any]:
    """Static decoding against drafts of depth 1 to 8: texts, forwards, time; on models of both kinds."""
    from stretto.bench.trial import claims_of, interleaved, trial
    from stretto.bench.workload import load_items, pick_tasks
    from stretto.llm import LLM

    rows, differ, prompts, saved, monotone = [], 0, 0, {}, True
    for name, n in (("zoo:tiny-blocks", 3 if quick else 24), ("zoo:tiny-diffusion", 1 if quick else 6)):
        llm = LLM(name, deterministic=True, plan=False, max_num_seqs=16)
        items = load_items(pick_tasks(list(TASKS)), n, 3, None, llm.tokenizer)
        static = trial(llm, items, "diffusion", {"unmask": "fixed"}, label="static")
        rows.append({"model": name, **static.row()})
        last = [float("inf")] * len(items)
        for d in DEPTHS:
            fast = trial(llm, items, "freedave", {"draft_steps": d}, label=f"freedave {d}")
            differ += sum(a != b for a, b in zip(fast.texts, static.texts, strict=True))
            prompts += len(items)
            counts = [o.metrics.forwards for o in fast.outputs]
            monotone &= all(a <= b for a, b in zip(counts, last, strict=True))
            last = counts
            rows.append({"model": name, **fast.row()})
            saved[name, d] = static.total("forwards") / fast.total("forwards")
    least, checked = _brute_force(quick)
    llm = LLM("zoo:tiny-blocks", max_num_seqs=1)
    items = load_items(pick_tasks(list(TASKS)), 1 if quick else 4, 5, None, llm.tokenizer)
    seconds = interleaved(
        llm, items, {"static": ("diffusion", {"unmask": "fixed"}), "freedave": ("freedave", {"draft_steps": 8})},
        rounds=2 if quick else 10,
    )
    wall = seconds["static"] / seconds["freedave"]
    best = saved["zoo:tiny-blocks", 8]
    return {
        "claims": claims_of(SYSTEM, {
            "throughput": (
                f"{best:.2f}x fewer forwards (blocks), {saved['zoo:tiny-diffusion', 8]:.2f}x (full attention), "
                f"{wall:.2f}x wall clock at batch 1",
                "static decoding of the same model, 1x", best >= 2 and wall >= 1.1,
                "depth 8; the bar of the project is half of the forwards saved; time with adaptive depth",
            ),
            "loss": (f"{differ} of {prompts} texts differ", "static decoding", differ == 0, "deterministic mode"),
            "fewest forwards": (
                f"equal to the brute-force minimum on {least} of {checked} runs; never more with depth: {monotone}",
                "a walk over the known static path", least == checked and monotone, "prompt by prompt",
            ),
        }),
        "rows": rows, "seed": 3, "tasks": list(TASKS),
    }


def _brute_force(quick: bool) -> tuple[int, int]:
    """On how many of so many runs the forwards are the fewest possible with d branches."""
    from dataclasses import replace

    import numpy as np

    from stretto.bench.trial import trial
    from stretto.bench.workload import load_items, pick_tasks
    from stretto.llm import LLM

    llm = LLM("zoo:tiny-blocks", deterministic=True, plan=False, max_num_seqs=1)
    method = llm.method("diffusion", {"unmask": "fixed"})
    plain, right, runs = method.denoiser, 0, 0
    for item in load_items(pick_tasks(list(TASKS)), 1 if quick else 3, 11, None, llm.tokenizer):
        states: list[tuple[int, list[tuple[int, int]]]] = []

        def observe(state: Any, c: Any, chosen: Any, states: list = states) -> None:
            order = np.argsort(-plain.order(state, c), kind="stable")
            states.append((state.canvas.start, [(state.positions[i], int(c.tokens[i])) for i in order]))

        method.denoiser = replace(plain, observe=observe)
        trial(llm, [item], "diffusion", {"unmask": "fixed"})
        method.denoiser = plain
        for d in DEPTHS:
            got = trial(llm, [item], "freedave", {"draft_steps": d}).total("forwards")
            right, runs = right + (got == fewest(states, d)), runs + 1
    return right, runs


def fewest(states: list[tuple[int, list[tuple[int, int]]]], d: int) -> int:
    """Forwards of draft-and-verify with ``d`` branches over a known static path: ``states`` hold the window and what
    the laws expect of its masked positions, best first; the first is what static decoding takes."""
    at = forwards = 0
    laws: list[tuple[int, int]] = []
    while at < len(states):
        window, reach = states[at][0], at
        guesses = iter(laws)
        for _ in range(d - 1):
            left = {i for i, _ in states[reach][1]}
            guess = next((g for g in guesses if g[0] in left), None)
            if guess is None or guess != states[reach][1][0] or reach + 1 >= len(states):
                break
            reach += 1
            if states[reach][0] != window:
                break
        same = reach + 1 < len(states) and states[reach + 1][0] == states[reach][0]
        laws = states[reach][1] if same else []
        at, forwards = reach + 1, forwards + 1
    return forwards


SYSTEM = System(
    slug="freedave",
    title="FreeDave",
    room="decoding",
    purpose=(
        "Decodes diffusion models in fewer forwards with exactly the text of slow decoding, "
        "without training or a second model."
    ),
    paper=(
        "Free Draft-and-Verification: Toward Lossless Parallel Decoding for Diffusion Large "
        "Language Models, 30 Sep 2025"
    ),
    claims=(
        Claim(
            name="throughput",
            paper="up to 3.78x on maths and code (Dream, LLaDA, SDAR, TraDo)",
            bar=(
                "1.5-3x fewer forwards on copy-like and arithmetic text; 1.1-2x wall clock at "
                "batch 1, block 8"
            ),
        ),
        Claim(
            name="loss",
            paper="none",
            bar="text equals static decoding on every prompt, fp32",
        ),
        Claim(
            name="fewest forwards",
            paper="with enough memory, the fewest that reproduce the static sequence",
            bar="forwards never rise with the depth; equals the brute-force minimum",
        ),
    ),
    parts=("stretto.decoding.freedave", "stretto.decoding.denoise"),
    command="stretto run zoo:tiny-blocks PROMPT --method freedave -o draft_steps=8",
    evidence=evidence,
)
