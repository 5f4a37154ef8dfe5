"""Zeppelin: Treat short, middle and long sequences differently in one data-parallel step."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="zeppelin",
    title="Zeppelin",
    purpose="Treat short, middle and long sequences differently in one data-parallel step.",
    paper=(
        "\"Zeppelin: Balancing Variable-length Workloads in Data Parallel Large Model Training\", arXiv"
        " 2509.21841, 26 Sep 2025 (EuroSys 2026)"
    ),
    claims=(
        Claim(
            "Average 2.80x over Transformer-Engine context parallelism",
            (
                "Average 2.80x over Transformer-Engine context parallelism (max 6.60x), also above "
                "Llama-style all-gather CP and hybrid DP (FLOP-balanced DP+CP)"
            ),
        ),
        Claim(
            "Ablation",
            (
                "Ablation: routing alone about 1.6x; attention engine with partitioning up to 3.2x on"
                " ArXiv; both 3.5x; remapping brings 3.51x to 3.64x there"
            ),
        ),
    ),
)
