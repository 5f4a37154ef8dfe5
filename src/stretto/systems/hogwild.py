"""Hogwild! Inference: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="hogwild",
    title="Hogwild! Inference",
    room="threads",
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
