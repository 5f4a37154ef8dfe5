"""ZO2."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="zo2",
    title="ZO2",
    purpose=(
        "Fine-tune a model that does not fit the compute device: two forward passes per step, blocks "
        "streamed in and out, update folded into the next step's visit."
    ),
    paper=(
        "\"ZO2: Scalable Zeroth-Order Fine-Tuning for Extremely Large Language Models with Limited GPU"
        " Memory\" (Mar 2025, arXiv 2503.12668, COLM 2025)"
    ),
    claims=(
        Claim(
            "OPT-175B full-parameter fine-tuning in 18 GB of",
            "OPT-175B full-parameter fine-tuning in 18 GB of GPU memory",
        ),
        Claim(
            "Throughput about that of non-offloaded MeZO",
            (
                "Throughput about that of non-offloaded MeZO (a few percent less at most sizes, "
                "unverified), because transfers hide behind the dual forward"
            ),
        ),
        Claim(
            "Exactly the losses and projected gradients of",
            (
                "Exactly the losses and projected gradients of plain MeZO (their tests compare the "
                "printed values for equality, iteration by iteration)"
            ),
        ),
    ),
)
