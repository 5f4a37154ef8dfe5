"""SimpleTool."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="simpletool",
    title="SimpleTool",
    purpose=(
        "Function name and every argument of a call decoded at the same time, each as one short "
        "stream opened by a special token."
    ),
    paper="SimpleTool: Parallel Decoding for Real-Time LLM Function Calling, Feb/Mar 2026 (arXiv 2603.00030)",
    claims=(
        Claim(
            "Two properties used together",
            (
                "Two properties used together: structured output is mostly predictable tokens (4-6x "
                "fewer tokens after compression), and arguments depend only weakly on each other"
            ),
        ),
        Claim(
            "3-6x end to end",
            (
                "3-6x end to end (up to 9.6x) on Qwen models 0.5B-14B, five benchmarks, accuracy "
                "equal or better; running 8 streams instead of one costs +8.2 % per step"
            ),
        ),
        Claim(
            "4B",
            "4B, AWQ, one consumer GPU: 61.2 ms median per call = 16 Hz",
        ),
    ),
)
