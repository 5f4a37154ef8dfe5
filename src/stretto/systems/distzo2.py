"""DistZO2: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="distzo2",
    title="DistZO2",
    room="training",
    purpose=(
        "Spreads fine-tuning without gradients over processes that exchange one number a step, so "
        "that the slowest network will do."
    ),
    paper=(
        "DistZO2: High-Throughput and Memory-Efficient Zeroth-Order Fine-tuning LLMs with "
        "Distributed Parallel Computing, Jul 2025 (arXiv 2507.03211)"
    ),
    claims=(
        Claim(
            name="throughput",
            paper="3x that of ZO2 on OPT-175B with several GPUs, same memory on each",
            bar="two processes of one core at least as fast as one of two cores, at fixed batch",
        ),
        Claim(
            name="accuracy",
            paper="that of MeZO on OPT-13B, batch 256: SST-2 91.4, BoolQ 67.6",
            bar=(
                "all ranks' weights bit-identical at every step; same accuracy as one process "
                "within seeds"
            ),
        ),
        Claim(
            name="communication",
            paper="one number a step",
            bar="under 100 bytes per rank and step",
        ),
    ),
)
