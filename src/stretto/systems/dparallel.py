"""dParallel: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="dparallel",
    title="dParallel",
    room="training",
    purpose=(
        "Makes a diffusion model certain about many tokens at once, so that threshold decoding "
        "needs far fewer forwards."
    ),
    paper="dParallel: Learnable Parallel Decoding for dLLMs, 30 Sep 2025 (ICLR 2026)",
    claims=(
        Claim(
            name="GSM8K, LLaDA-8B-Instruct",
            paper="256 to 30 steps, 8.5x faster, accuracy 75.7 to 76.1",
            bar="1.5-2.5x fewer forwards than the base at threshold 0.9, accuracy within 1 point",
        ),
        Claim(
            name="GSM8K, Dream-7B",
            paper="39 steps, 6.9x faster, accuracy 82.9 to 82.1",
        ),
        Claim(
            name="code, LLaDA",
            paper="HumanEval 8.2x at 40.2 (38.4); MBPP 10.5x at 40.8 (42.4)",
        ),
        Claim(
            name="certainty, not only correctness",
            paper="consistency distillation at 64 steps reaches only 69.9 on GSM8K",
            bar=(
                "certainty on all positions loses accuracy; cross-entropy alone gives part of the "
                "gain"
            ),
        ),
    ),
)
