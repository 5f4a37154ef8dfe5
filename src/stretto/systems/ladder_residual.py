"""Ladder Residual: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="ladder-residual",
    title="Ladder Residual",
    room="models",
    purpose=(
        "Hides tensor parallelism's all-reduce behind compute by feeding each block the stream "
        "without its predecessor's output."
    ),
    paper=(
        "Ladder-residual: parallelism-aware architecture for accelerating large model inference "
        "with communication overlapping, Jan 2025 (ICML 2025, arXiv 2501.06589)"
    ),
    claims=(
        Claim(
            name="speed of a 70B shape, 8 GPUs",
            paper="29-30 % with NVLink: 77.4 to 101.2 tokens/s",
            bar=(
                "time per block approaches max(compute, communication) on a delayed link; nothing "
                "at TP = 1"
            ),
        ),
        Claim(
            name="speed without P2P",
            paper="51.7 to 82.6 tokens/s, all-reduce removed 110.6 with NVLink",
        ),
        Claim(
            name="quality from scratch",
            paper="1.2B and 3.5B about equal to the standard model",
            bar=(
                "same seed and steps: no worse than the standard model, better than parallel "
                "attention + MLP or equal"
            ),
        ),
        Claim(
            name="conversion",
            paper="last 16 of 32 layers of an 8B after 3B tokens: within a small margin",
        ),
    ),
)
