"""PPD: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="ppd",
    title="PPD",
    room="decoding",
    purpose=(
        "Finishes several tokens per forward with an adapter of a few embedding vectors: trained "
        "prompt tokens guess ahead. Lossless."
    ),
    paper=(
        "Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM "
        "Inference, May 2024 (arXiv 2405.18628)"
    ),
    claims=(
        Claim(
            name="speed",
            paper="up to 2.49x; Vicuna-7B 39.2 to 88.0 tokens/s, Medusa 82.0",
            bar="1.4-2.2 tokens a step, 1.1-1.7x wall clock at batch 1",
        ),
        Claim(
            name="size",
            paper="0.0002 % of the parameters; 0.004 % of Medusa's extra memory",
            bar="above 1000 times smaller than Medusa",
        ),
        Claim(
            name="distant tokens",
            paper="up to 28 % higher acceptance than independent heads",
            bar="top-k accuracy per distance against Medusa heads of equal training time",
        ),
        Claim(
            name="on top of a draft",
            paper="up to 1.22x more",
        ),
    ),
)
