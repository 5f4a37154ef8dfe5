"""LightningRL: Reinforcement learning that looks for fast correct decoding paths of block-wise diffusion LMs."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="lightningrl",
    title="LightningRL",
    purpose="Reinforcement learning that looks for fast correct decoding paths of block-wise diffusion LMs.",
    paper=(
        "LightningRL: Breaking the Accuracy-Parallelism Trade-off of Block-wise dLLMs via "
        "Reinforcement Learning, 4 Mar 2026 (arXiv 2603.13319)"
    ),
    claims=(
        Claim(
            "SDAR-8B with block 32",
            "SDAR-8B with block 32",
        ),
        Claim(
            "Other RL on the same base",
            "Other RL on the same base: TraceRL GSM8K 76.9/5.04/378.6 (accuracy lost)",
        ),
        Claim(
            "H100",
            "H100, GSM8K: 336 tok/s (SDAR 105.6, d3LLM-LLaDA 288.9, Qwen2.5-7B AR 57.3)",
        ),
    ),
)
