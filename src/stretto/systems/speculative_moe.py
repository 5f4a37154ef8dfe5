"""Speculative MoE: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="speculative-moe",
    title="Speculative MoE",
    room="experts",
    purpose=(
        "Cuts the traffic of expert parallelism with identical outputs: token ids foretell "
        "experts, so both are placed together."
    ),
    paper=(
        "Speculative MoE: Communication Efficient Parallel MoE Inference with Speculative Token "
        "and Expert Pre-scheduling, 6 Mar 2025 (arXiv 2503.04398)"
    ),
    claims=(
        Claim(
            name="throughput under a service level",
            paper="up to 4.3x (first version; unverified), up to 2.78x later",
            bar="bytes of all-to-all fall in proportion to the share kept local",
        ),
        Claim(
            name="local activation",
            paper="25 % to 46-47 % with 4 groups",
            bar="a clear gain on held-out text, smaller on a new task",
        ),
        Claim(
            name="prediction from the token id",
            paper="F1 1.0 at layer 1, 0.83 at layer 26",
            bar="F1 per layer of the static predictor",
        ),
        Claim(
            name="output",
            paper="unchanged: a wrong guess is a remote hop",
            bar="equal to plain expert parallelism and to one rank",
        ),
    ),
)
