"""ThreadWeaver: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="threadweaver",
    title="ThreadWeaver",
    room="threads",
    purpose=(
        "Reasons in parallel threads on any completion engine, trained to be as right as one "
        "thread with a shorter wait."
    ),
    paper=(
        "ThreadWeaver: Adaptive Threading for Efficient Parallel Reasoning in Language Models, Nov "
        "2025 (arXiv 2512.07843)"
    ),
    claims=(
        Claim(
            name="accuracy, Qwen3-8B, six sets",
            paper="71.9 against 72.2 of the sequential model",
            bar="within 1.5 points of the flat model",
        ),
        Claim(
            name="critical path",
            paper="15.1k to 13.2k tokens, mean speed-up 1.22",
            bar="20-40 % shorter on the task of products",
        ),
        Claim(
            name="wall clock, 50 MATH500 problems",
            paper="162.3 to 142.2 s",
            bar="gain below that in tokens, because of the join",
        ),
        Claim(
            name="advantages are not divided by their spread",
            paper="dividing: 74.8 % and an 18.7k path instead of 79.9 % and 16.9k",
            bar="learning curves of both",
        ),
    ),
)
