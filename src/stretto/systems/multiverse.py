"""Multiverse: what its paper claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stretto.systems.types import Claim, System


def evidence(quick: bool) -> Mapping[str, Any]:
    """Held-out problems in parallel, step by step, and with the same blocks in line; the same weights, in turns."""
    from stretto.bench.provenance import provenance
    from stretto.llm import LLM
    from stretto.threads.measure_multiverse import MODEL, measure

    llm = LLM(MODEL, enable_prefix_caching=False)
    return measure(llm, quick) | {"provenance": provenance(llm)}


SYSTEM = System(
    slug="multiverse",
    title="Multiverse",
    room="threads",
    parts=(
        "stretto.outline", "stretto.session", "stretto.threads.multiverse", "stretto.threads.crew",
        "stretto.training.spans", "stretto.training.curator", "stretto.training.parallel_units",
    ),
    command="stretto reproduce multiverse",
    evidence=evidence,
    purpose=(
        "Lets a model write independent parts of its answer in parallel over one cache, and join "
        "them at no cost."
    ),
    paper=(
        "Multiverse: Your Language Models Secretly Decide How to Parallelize and Merge Generation, "
        "Jun 2025 (arXiv 2506.09991)"
    ),
    claims=(
        Claim(
            name="accuracy, 32B",
            paper=(
                "AIME24 53.8, AIME25 45.8 against 54.6 and 45.0 of the flat model on the same data"
            ),
            bar="exact match within 1-2 points of the flat model",
        ),
        Claim(
            name="degree of parallelism",
            paper="1.15-1.18 on reasoning",
            bar="1.5-3x fewer forwards on data with independent sub-results",
        ),
        Claim(
            name="speed",
            paper="up to 2x for highly parallel outputs, batch 1-128",
            bar="wall clock gain somewhat below that in forwards",
        ),
        Claim(
            name="equal time",
            paper="+1.87 % on average",
        ),
    ),
)
