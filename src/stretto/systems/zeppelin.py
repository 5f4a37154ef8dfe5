"""Zeppelin: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="zeppelin",
    title="Zeppelin",
    room="parallel",
    purpose=(
        "Trains on mixed lengths without padding or idle ranks: short, middle and long sequences "
        "each take their own way."
    ),
    paper=(
        "Zeppelin: Balancing Variable-length Workloads in Data Parallel Large Model Training, 26 "
        "Sep 2025 (arXiv 2509.21841, EuroSys 2026)"
    ),
    claims=(
        Claim(
            name="throughput",
            paper="2.80x on average over context parallelism, at most 6.60x",
            bar="simulator, 16-128 ranks: grows as lengths get shorter, 1 when all are longest",
        ),
        Claim(
            name="ablation",
            paper="routing 1.6x, attention engine up to 3.2x, both 3.5x, with remapping 3.64x",
            bar=(
                "attention imbalance below 1.1, tokens within 1 after remapping, cross-node bytes "
                "several-fold fewer"
            ),
        ),
        Claim(
            name="transfer between nodes",
            paper="2.18 to 0.41 ms a round with routing",
        ),
    ),
)
