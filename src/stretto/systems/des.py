"""DES: Dynamic Expert Sharing: one small set of experts per decoding block of an MoE diffusion LM."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="des",
    title="DES",
    purpose="Dynamic Expert Sharing: one small set of experts per decoding block of an MoE diffusion LM.",
    paper=(
        "Dynamic Expert Sharing: Decoupling Memory from Parallelism in Mixture-of-Experts Diffusion "
        "LLMs, 31 Jan 2026 (arXiv 2602.00879; Imperial College, Samsung AI)"
    ),
    claims=(
        Claim(
            "Expert explosion\"",
            (
                "Expert explosion\": the number of distinct experts used in one forward grows almost "
                "linearly with the tokens decoded in parallel"
            ),
        ),
        Claim(
            "DES cuts distinct expert activations by more",
            (
                "DES cuts distinct expert activations by more than 55 % and latency by up to 38 %, "
                "keeping 99 % of the accuracy, on MoE diffusion LMs, without training"
            ),
        ),
        Claim(
            "Relative",
            (
                "Relative: OEA on AR batches of 16 (Qwen3-30B/235B): MoE latency −39 % / −15 % "
                "without significant loss"
            ),
        ),
    ),
)
