"""SimpleTool: what its paper claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stretto.systems.types import Claim, System


def evidence(quick: bool) -> Mapping[str, Any]:
    """Calls on held-out prompts by parallel fields and by JSON, the same weights, in turns."""
    from stretto.bench.provenance import provenance
    from stretto.llm import LLM
    from stretto.threads.measure_slots import MODEL, measure

    llm = LLM(MODEL, enable_prefix_caching=False)
    return measure(llm, quick) | {"provenance": provenance(llm)}


SYSTEM = System(
    slug="simpletool",
    title="SimpleTool",
    room="threads",
    parts=("stretto.session", "stretto.threads.slots", "stretto.threads.tools", "stretto.training.trie"),
    command="stretto reproduce simpletool",
    evidence=evidence,
    purpose=(
        "Makes a tool call as quick as its longest argument: name and arguments are decoded at the "
        "same time."
    ),
    paper=(
        "SimpleTool: Parallel Decoding for Real-Time LLM Function Calling, Feb 2026 (arXiv "
        "2603.00030)"
    ),
    claims=(
        Claim(
            name="end to end",
            paper="3-6x, up to 9.6x, Qwen 0.5B-14B, accuracy equal or better",
            bar=(
                "4-8x fewer forwards than JSON, 3-5x wall clock, exact match within a point on "
                "independent arguments"
            ),
        ),
        Claim(
            name="eight streams",
            paper="+8.2 % a step",
            bar="time of a step with 8 rows against 1",
        ),
        Claim(
            name="4B on a consumer GPU",
            paper="61.2 ms a call",
        ),
        Claim(
            name="shorter output",
            paper="4-6x fewer tokens by compression",
            bar="compression and parallelism measured apart",
        ),
    ),
)
