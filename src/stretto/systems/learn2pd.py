"""Learn2PD: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="learn2pd",
    title="Learn2PD",
    room="decoding",
    purpose=(
        "Speeds up an untouched diffusion model: a tiny filter learns which predictions are final, "
        "and decoding stops at the end of the text."
    ),
    paper=(
        "Learning to Parallel: Accelerating Diffusion Large Language Models via Learnable Parallel "
        "Decoding, 29 Sep 2025"
    ),
    claims=(
        Claim(
            name="GSM8K, 1024 tokens, LLaDA-8B-Instruct",
            paper="up to 22.58x with no loss, 57.51x with a K/V cache",
            bar="between threshold 0.9 and the oracle in tokens per forward, in distribution",
        ),
        Claim(
            name="oracle that unmasks what is already right",
            paper="more than an order of magnitude",
            bar=(
                "at least 3x the tokens per forward of threshold 0.9; its text equals the "
                "reference by construction"
            ),
        ),
        Claim(
            name="padding after the end",
            paper="up to 90 % of the work at a canvas of 1024",
            bar="stopping at the end gives about canvas / answer at canvas 256, with the same text",
        ),
    ),
)
