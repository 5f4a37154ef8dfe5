"""LightningRL: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="lightningrl",
    title="LightningRL",
    room="training",
    purpose=(
        "Raises tokens per forward of a block diffusion model at the same threshold, by "
        "reinforcement learning on prompts with checkable answers."
    ),
    paper=(
        "LightningRL: Breaking the Accuracy-Parallelism Trade-off of Block-wise dLLMs via "
        "Reinforcement Learning, 4 Mar 2026 (arXiv 2603.13319)"
    ),
    claims=(
        Claim(
            name="GSM8K, SDAR-8B",
            paper="accuracy 88.9 to 90.3, tokens per forward 2.85 to 5.58",
            bar="tokens per forward x1.2-2 at accuracy -1 to +2 points, threshold 0.9, 3 seeds",
        ),
        Claim(
            name="MBPP",
            paper="58.0 to 58.3, tokens per forward 2.44 to 11.10",
        ),
        Claim(
            name="mean",
            paper="7.32 tokens per forward, AUP 497.9",
        ),
        Claim(
            name="speed is rewarded, not only truth",
            paper="correctness-only RL hardly moves tokens per forward (2.3-2.7 on code)",
            bar="correctness-only RL with the same rollouts moves them little",
        ),
    ),
)
