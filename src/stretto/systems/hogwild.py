"""Hogwild! Inference: what its paper claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stretto.systems.types import Claim, System


def evidence(quick: bool) -> Mapping[str, Any]:
    """Held-out problems of eight items: 1 to 4 workers, other layouts, independent workers with voting, in turns."""
    from stretto.bench.provenance import provenance
    from stretto.llm import LLM
    from stretto.threads.measure_hogwild import MODEL, measure

    llm = LLM(MODEL, dtype="float32", enable_prefix_caching=False)
    return measure(llm, quick) | {"provenance": provenance(llm)}


SYSTEM = System(
    slug="hogwild",
    title="Hogwild! Inference",
    room="threads",
    parts=(
        "stretto.threads.hogwild", "stretto.threads.hogwild_texts", "stretto.shared", "stretto.engine.team",
        "stretto.models.turned", "stretto.models.segments", "stretto.training.worker_traces",
        "stretto.training.worker_data",
    ),
    command="stretto reproduce hogwild",
    evidence=evidence,
    purpose=(
        "Shortens the wait for answers that can be divided: several workers of one unmodified "
        "model write into one cache that all read."
    ),
    paper=(
        "Hogwild! Inference: Parallel LLM Generation via Concurrent Attention, Apr 2025 (arXiv "
        "2504.06261, NeurIPS 2025)"
    ),
    claims=(
        Claim(
            name="accuracy at equal forwards",
            paper=(
                "2 workers above one thread at small and medium budgets (QwQ-32B, 512 LIMO "
                "problems)"
            ),
            bar=(
                "forwards to finish 8 items about 1/2 with 2 workers, 1/3 to 1/4 with 4; accuracy "
                "within 2 points"
            ),
        ),
        Claim(
            name="ceiling",
            paper="89.65 % by one thread with 16384 tokens",
        ),
        Claim(
            name="throughput (from memory)",
            paper="about 20 tokens/s for 1 worker, 36 for 2, 69 for 4",
            bar="wall clock falls nearly as much as forwards",
        ),
        Claim(
            name="coordination through the cache",
            paper="workers plan and divide without rules",
            bar="redundant items near 0 with token-level visibility, nearly all without",
        ),
    ),
)
