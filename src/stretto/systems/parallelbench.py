"""ParallelBench: A benchmark that shows when decoding several tokens at once must hurt."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="parallelbench",
    title="ParallelBench",
    purpose="A benchmark that shows when decoding several tokens at once must hurt.",
    paper=(
        "ParallelBench: Understanding the Trade-offs of Parallel Decoding in Diffusion LLMs, 6 Oct "
        "2025 (ICLR 2026)"
    ),
    claims=(
        Claim(
            "One-step parallel decoding with any model that",
            (
                "One-step parallel decoding with any model that outputs per-position laws has KL "
                "error at least C(Y|X) = Σ H(y_i|X) − H(Y|X), the conditional total correlation"
            ),
        ),
        Claim(
            "17 tasks that people and AR models",
            (
                "17 tasks that people and AR models solve trivially (10 waiting line, 5 text, 2 "
                "puzzles). dLLMs (LLaDA 1.0/1.5, Dream, DiffuCoder, SEDD, TraDo"
            ),
        ),
        Claim(
            "Only relations are given here",
            (
                "Only relations are given here, not score tables: the paper's tables were not read "
                "(unverified numbers are left out)"
            ),
        ),
    ),
)
