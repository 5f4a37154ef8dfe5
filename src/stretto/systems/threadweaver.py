"""ThreadWeaver: what its paper claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stretto.systems.types import Claim, System


def evidence(quick: bool) -> Mapping[str, Any]:
    """Held-out problems in threads and step by step by the same weights, in turns; short runs of P-GRPO both ways."""
    from stretto.bench.provenance import provenance
    from stretto.llm import LLM
    from stretto.threads.measure_threadweaver import MODEL, measure

    llm = LLM(MODEL, enable_prefix_caching=False)
    return measure(llm, quick) | {"provenance": provenance(llm)}


SYSTEM = System(
    slug="threadweaver",
    title="ThreadWeaver",
    room="threads",
    parts=(
        "stretto.machine", "stretto.outline", "stretto.threads.threadweaver", "stretto.threads.endpoint",
        "stretto.training.thread_units", "stretto.training.threads_run", "stretto.training.p_grpo",
    ),
    command="stretto reproduce threadweaver",
    evidence=evidence,
    purpose=(
        "Reasons in parallel threads on any completion engine, trained to be as right as one "
        "thread with a shorter wait."
    ),
    paper=(
        "ThreadWeaver: Adaptive Threading for Efficient Parallel Reasoning in Language Models, Nov "
        "2025 (arXiv 2512.07843)"
    ),
    claims=(
        Claim(
            name="accuracy, Qwen3-8B, six sets",
            paper="71.9 against 72.2 of the sequential model",
            bar="within 1.5 points of the flat model",
        ),
        Claim(
            name="critical path",
            paper="15.1k to 13.2k tokens, mean speed-up 1.22",
            bar="20-40 % shorter on the task of products",
        ),
        Claim(
            name="wall clock, 50 MATH500 problems",
            paper="162.3 to 142.2 s",
            bar="gain below that in tokens, because of the join",
        ),
        Claim(
            name="latency on independent parts",
            paper="best problems 3.05 to 3.56 x in tokens",
            bar="at least 1.5 x, critical path and wall clock, at equal or better accuracy",
        ),
        Claim(
            name="advantages are not divided by their spread",
            paper="dividing: 74.8 % and an 18.7k path instead of 79.9 % and 16.9k",
            bar="learning curves of both",
        ),
    ),
)
