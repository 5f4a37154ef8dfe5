"""LLEP."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="llep",
    title="LLEP",
    purpose=(
        "When a few experts are hot, send their surplus tokens and their weights to the least-loaded "
        "devices, exactly."
    ),
    paper=(
        "Least-Loaded Expert Parallelism: Load Balancing An Imbalanced Mixture-of-Experts, arXiv "
        "2601.17111, 23 Jan 2026 (Salesforce AI Research)"
    ),
    claims=(
        Claim(
            "MoE layer",
            (
                "MoE layer, 8 × H200, up to 5-6.1× faster than standard EP and 4-5× less peak memory "
                "when 30-95% of tokens hit 1, 4 or 16 experts; ≈ 1× when balanced (0.92-1.07)"
            ),
        ),
        Claim(
            "Full model forward",
            (
                "Full model forward: gpt-oss-20b 2.2×, 120b 1.9× at 8-32 GPUs on its own maths data "
                "(natural imbalance: one expert 20% of tokens vs 3% balanced; one GPU 30-35% vs "
                "12.5%)"
            ),
        ),
        Claim(
            "Ablations",
            (
                "Ablations: speed-up grows with batch (4k→64k), hidden size, number of experts; α = 1"
                " best at large batch, falls as α → 3; λ matters at small batch (8k) and mild "
                "imbalance (15-20%)"
            ),
        ),
    ),
)
