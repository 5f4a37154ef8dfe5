"""Aurora."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="aurora",
    title="Aurora",
    purpose=(
        "The drafter learns from live traffic: every accepted and rejected proposal is a training "
        "signal, new weights are swapped in while serving."
    ),
    paper=(
        "When RL Meets Adaptive Speculative Training: A Unified Training-Serving System, Feb 2026 "
        "(arXiv 2602.06932, Together AI; ICML 2026)"
    ),
    claims=(
        Claim(
            "No offline drafter training needed",
            (
                "No offline drafter training needed: day-0 deployment with an untrained drafter, "
                "≈1.5× on new frontier models (MiniMax M2.1 229B: mean accepted length 2.8, 1.45×"
            ),
        ),
        Claim(
            "1.25× more over a well-trained static drafter",
            "1.25× more over a well-trained static drafter under traffic shift (Qwen3-8B, Llama-3)",
        ),
        Claim(
            "Ablations",
            (
                "Ablations: reverse-KL + rejected-branch signal + next-token CE is best, but most of "
                "the gain comes from the online loop itself"
            ),
        ),
    ),
)
