"""Jacobi Forcing: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="jacobi-forcing",
    title="Jacobi Forcing",
    room="decoding",
    purpose=(
        "Turns a causal model into one that fixes whole blocks in a few forwards, by training on "
        "its own parallel decoding."
    ),
    paper=(
        "Fast and Accurate Causal Parallel Decoding using Jacobi Forcing, 16 Dec 2025 (arXiv "
        "2512.14681)"
    ),
    claims=(
        Claim(
            name="wall clock on code and maths",
            paper="about 3.8x; about 4.0x and up to 4.5 tokens a forward with multi-block",
            bar="2-4 tokens a forward on templated answers; untuned 1.05-1.4",
        ),
        Claim(
            name="HumanEval, Qwen2.5-Coder-7B",
            paper="41.3 to 159.5 tokens/s, 87.8 to 83.5 %",
            bar="accuracy at most 3 points lower",
        ),
        Claim(
            name="GSM8K",
            paper="41.8 to 146.1 tokens/s, 92.4 to 91.4 %",
        ),
        Claim(
            name="progressive noise",
            paper=(
                "84.7 % at 0.48 iterations a token; random 83.5 % at 0.53; reversed 82.3 % at 0.62"
            ),
            bar="the order of the three schedules",
        ),
    ),
)
