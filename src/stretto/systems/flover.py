"""Flover: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="flover",
    title="Flover",
    room="engine",
    purpose=(
        "Answers requests that arrive while others run without waiting for a batch, on dense slots "
        "that close up when one ends."
    ),
    paper=(
        "Flover: A Temporal Fusion Framework for Efficient Autoregressive Model Parallel "
        "Inference, 22 May 2023 (arXiv 2305.13484, HiPC 2023)"
    ),
    claims=(
        Claim(
            name="against FasterTransformer, one after another",
            paper="over 11x on GPT-J, 16x on LLaMA",
            bar="near the machine's batch efficiency for dense arrivals",
        ),
        Claim(
            name="speed-up over mean gap of 32 requests",
            paper="11.2x at 20 ms, 9.1x at 200, 4.2x at 1000, 1.1x at 5000",
            bar="falls with the gap to 1 at sparse arrivals; equals the overlap",
        ),
        Claim(
            name="compaction, uneven lengths",
            paper="1.15x to 1.23x",
            bar="1.1-1.25x with lengths 16 to 256; moves are the minimum",
        ),
    ),
)
