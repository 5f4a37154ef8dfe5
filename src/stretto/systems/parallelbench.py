"""ParallelBench: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="parallelbench",
    title="ParallelBench",
    room="bench",
    purpose=(
        "Shows how many tokens at once a decoder may finish on which kind of task before its "
        "answers must get worse."
    ),
    paper=(
        "ParallelBench: Understanding the Trade-offs of Parallel Decoding in Diffusion LLMs, 6 Oct "
        "2025 (ICLR 2026)"
    ),
    claims=(
        Claim(
            name="bound",
            paper="one-step parallel decoding errs by at least the conditional total correlation",
            bar="an oracle meets the closed forms within 3 sigma over 20 000 draws, n = 3 to 8",
        ),
        Claim(
            name="collapse",
            paper=(
                "dLLMs fail tasks that people and autoregressive models solve, as parallelism grows"
            ),
            bar=(
                "copy and replace stay at 95 % with 4 and 8 a step, shuffle falls along the formula"
            ),
        ),
        Claim(
            name="no rule adapts",
            paper="a per-sample best setting would be far better than any tested rule",
            bar="lossless methods are flat: same score at more tokens per forward",
        ),
    ),
)
