"""NAP: Train diffusion LMs on several independent reasoning paths and force them to grow in parallel."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="nap",
    title="NAP",
    purpose="Train diffusion LMs on several independent reasoning paths and force them to grow in parallel.",
    paper=(
        "Why Diffusion Language Models Struggle with Truly Parallel (Non-Autoregressive) Decoding?, "
        "Feb 2026 (arXiv 2602.23225)"
    ),
    claims=(
        Claim(
            "Diagnosis",
            "Diagnosis: fast diffusion LMs decode almost left to right",
        ),
        Claim(
            "Cure by data + decoding",
            "Cure by data + decoding: several independent reasoning trajectories + summary",
        ),
    ),
)
