"""ZO2: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="zo2",
    title="ZO2",
    room="training",
    purpose=(
        "Fine-tunes a model that does not fit the device, with the memory of inference: blocks "
        "stream in and out of two forwards."
    ),
    paper=(
        "ZO2: Scalable Zeroth-Order Fine-Tuning for Extremely Large Language Models with Limited "
        "GPU Memory, Mar 2025 (arXiv 2503.12668, COLM 2025)"
    ),
    claims=(
        Claim(
            name="memory",
            paper="OPT-175B in 18 GB, 13B in 6.18 GB",
            bar="slots of 3 blocks and the resident part, whatever the depth",
        ),
        Claim(
            name="throughput",
            paper="about that of MeZO without offloading (unverified)",
            bar="1.3-1.8x from overlap when upload and compute balance",
        ),
        Claim(
            name="exactness",
            paper="losses and gradients equal MeZO's",
            bar="losses and weights bit-identical over 50 steps",
        ),
    ),
)
