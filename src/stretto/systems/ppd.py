"""PPD."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="ppd",
    title="PPD",
    purpose=(
        "Trained prompt tokens guess the next tokens inside the target's own forward, in a tree sized"
        " for the device."
    ),
    paper=(
        "Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference, "
        "May 2024 (arXiv 2405.18628)"
    ),
    claims=(
        Claim(
            "Up to 2.49× speed-up",
            "Up to 2.49× speed-up; trainable share 0.0002 % of the parameters (a few embedding vectors)",
        ),
        Claim(
            "Up to 28 % higher acceptance at",
            (
                "Up to 28 % higher acceptance at long distances than independent heads (the gap to "
                "Medusa's top-10 accuracy grows from 0.03 at distance 2 to 0.12 at distance 4)"
            ),
        ),
        Claim(
            "Up to 1.22× more on top of",
            (
                "Up to 1.22× more on top of ordinary speculative decoding, by making the draft model "
                "(68 M) itself a PPD model"
            ),
        ),
    ),
)
