"""Aurora: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="aurora",
    title="Aurora",
    room="serving",
    purpose=(
        "Makes a drafter fit a service's own traffic while it serves, from nothing if need be, "
        "without touching the output."
    ),
    paper=(
        "When RL Meets Adaptive Speculative Training: A Unified Training-Serving System, Feb 2026 "
        "(arXiv 2602.06932, ICML 2026)"
    ),
    claims=(
        Claim(
            name="day-0 start from an untrained drafter",
            paper="about 1.5x on new frontier models; MiniMax M2.1: accepted length 2.8",
            bar="accepted length from 1.0 to 2-3 within some hundred requests of templated traffic",
        ),
        Claim(
            name="gain under traffic shift",
            paper="1.25x more than a well-trained static drafter",
            bar="accepted length recovers after each shift while the static drafter's stays low",
        ),
        Claim(
            name="mixed stream of 40 k prompts",
            paper="accepted length 3.08 online, 2.63 static, 2.99 offline fine-tuned",
        ),
        Claim(
            name="output",
            paper="unchanged, whatever the drafter's version",
            bar="served greedy text equals plain decoding across swaps",
        ),
    ),
)
