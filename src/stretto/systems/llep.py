"""LLEP: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="llep",
    title="LLEP",
    room="experts",
    purpose=(
        "Removes stragglers of skewed expert routing: surplus tokens and weights of hot experts go "
        "to the least loaded devices, exactly."
    ),
    paper=(
        "Least-Loaded Expert Parallelism: Load Balancing An Imbalanced Mixture-of-Experts, 23 Jan "
        "2026 (arXiv 2601.17111)"
    ),
    claims=(
        Claim(
            name="layer, 30-95 % of tokens on 1-16 experts",
            paper="up to 5-6.1x faster than expert parallelism, 4-5x less peak memory",
            bar=(
                "slowest rank 1.0-1.1x the mean, where plain expert parallelism reaches the number "
                "of ranks"
            ),
        ),
        Claim(
            name="balanced routing",
            paper="0.92-1.07x",
            bar="no transfers",
        ),
        Claim(
            name="whole model",
            paper="gpt-oss-20b 2.2x, 120b 1.9x on natural imbalance",
            bar="prefill throughput on a model trained without balance loss",
        ),
        Claim(
            name="training",
            paper="1.25x faster to the same accuracy",
            bar="loss over 200 steps equal within fp32 noise",
        ),
    ),
)
