"""ExFlow: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="exflow",
    title="ExFlow",
    room="experts",
    purpose=(
        "Halves the collectives of expert-parallel decoding and places experts so that the next "
        "one is usually already there."
    ),
    paper=(
        "Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model "
        "Inference, 16 Jan 2024 (arXiv 2401.08383, IPDPS 2024)"
    ),
    claims=(
        Claim(
            name="routing latency across GPUs",
            paper="up to 67 % less",
            bar="2L collectives a forward become L + 1; time falls with the link's latency",
        ),
        Claim(
            name="throughput",
            paper="up to 2.2x DeepSpeed-MoE (16 experts on 8 GPUs), 1.6x at 32 experts",
        ),
        Claim(
            name="crossings after placement",
            paper="64 experts: -40 % on 4 GPUs, -25 % on 32",
            bar="a clear drop on a trained model with 4 devices; none with uniform routing",
        ),
        Claim(
            name="accuracy",
            paper="unchanged, no fine-tuning",
            bar="output equals one rank's, token for token",
        ),
    ),
)
