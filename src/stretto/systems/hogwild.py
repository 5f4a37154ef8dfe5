"""Hogwild! Inference: Several workers of one model write concurrently into one K/V cache that all of them read."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="hogwild",
    title="Hogwild! Inference",
    purpose="Several workers of one model write concurrently into one K/V cache that all of them read.",
    paper=(
        "Hogwild! Inference: Parallel LLM Generation via Concurrent Attention, Apr 2025 (arXiv "
        "2504.06261, NeurIPS 2025)"
    ),
    claims=(
        Claim(
            "Reasoning LLMs",
            (
                "Reasoning LLMs (QwQ-32B, also DeepSeek-R1, Qwen3, Phi-4-reasoning class) cooperate "
                "through a shared, live cache without any fine-tuning; at an equal number of forward "
                "steps per worker"
            ),
        ),
        Claim(
            "Reference curve",
            (
                "Reference curve: 512 LIMO problems, QwQ-32B, 2 workers, accuracy against the per-"
                "worker token budget; one thread with 16384 tokens scores 89.65 % and is the ceiling "
                "line"
            ),
        ),
        Claim(
            "Throughput",
            (
                "Throughput (remembered from the paper, unverified): about 20 tok/s for one thread, "
                "about 36 for 2 workers and about 69 for 4 on one 48 GB GPU with the AWQ model"
            ),
        ),
    ),
)
