"""NAP: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="nap",
    title="NAP",
    room="decoding",
    purpose=(
        "Makes a diffusion model reason on several independent paths in every forward, and tells "
        "how sequential a decoder really is."
    ),
    paper=(
        "Why Diffusion Language Models Struggle with Truly Parallel (Non-Autoregressive) "
        "Decoding?, Feb 2026 (arXiv 2602.23225)"
    ),
    claims=(
        Claim(
            name="diagnosis",
            paper=(
                "global ARness@1 of free order: LLaDA-8B 0.73, Dream-7B 0.92; after fine-tuning "
                "0.81 and 0.93"
            ),
            bar="lower ARness than single-chain decoding; exactly 1 for an autoregressive order",
        ),
        Claim(
            name="GSM8K, Dream, 1 / 2 / 3 / 4 tokens a step",
            paper="83.6 / 79.2 / 70.9 / 60.9 against 78.0 / 66.8 / 56.9 / 46.5",
            bar="near equality at 1 a step, several points ahead from 3 a step",
        ),
        Claim(
            name="GSM8K, LLaDA",
            paper="84.1 / 82.6 / 63.3 / 56.1 against 83.5 / 82.0 / 60.9 / 54.1",
        ),
    ),
)
