"""Multiverse."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="multiverse",
    title="Multiverse",
    purpose=(
        "The model itself writes Map / Process / Reduce, and its engine runs the Process paths in "
        "parallel over one cache."
    ),
    paper=(
        "Multiverse: Your Language Models Secretly Decide How to Parallelize and Merge Generation, "
        "Jun 2025 (arXiv 2506.09991)"
    ),
    claims=(
        Claim(
            "Degree of parallelism = tokens generated /",
            "Degree of parallelism = tokens generated / length of the longest dependent chain",
        ),
        Claim(
            "Cost",
            "Cost: 1K examples, 3 hours on 8 B200 (or 16 H100)",
        ),
    ),
)
