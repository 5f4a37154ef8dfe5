"""C4: Find the faulty rank or link from the rhythm of collectives, and plan flows so they do not collide."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="c4",
    title="C4",
    purpose="Find the faulty rank or link from the rhythm of collectives, and plan flows so they do not collide.",
    paper=(
        "\"Boosting Large-scale Parallel Training Efficiency with C4: A Communication-Driven "
        "Approach\", arXiv 2406.04594, Jun 2024 (v2 May 2025; HPCA 2025 under the title \"Enhancing "
        "Large-Scale AI Training Efficiency: The C4 Solution ...\")"
    ),
    claims=(
        Claim(
            "Error-induced overhead cut by about 30 points",
            (
                "Error-induced overhead cut by about 30 points: for one large GPT job downtime went "
                "from 31.19 % to 1.16 % of the time between two half-years"
            ),
        ),
        Claim(
            "128 H800s",
            "128 H800s, 16 nodes, 8 bonded 2x200 Gb/s NICs, 3-tier fat tree",
        ),
    ),
)
