"""ByteScale: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="bytescale",
    title="ByteScale",
    room="parallel",
    purpose=(
        "Trains on texts of very different lengths at a long context limit faster: each sequence "
        "takes just the ranks it needs."
    ),
    paper=(
        "ByteScale: Efficient Scaling of LLM Training with a 2048K Context Length on More Than "
        "12,000 GPUs, Feb 2025 (arXiv 2502.21231, SIGCOMM 2025)"
    ),
    claims=(
        Claim(
            name="throughput",
            paper="up to 7.89x over MegaScale with static data x context parallelism",
        ),
        Claim(
            name="context doubled",
            paper="the baseline loses half its throughput, balanced hybrid data parallelism 1.08x",
            bar=(
                "simulator at 128-1024 ranks: the baseline halves with each doubling, balanced "
                "stays nearly flat"
            ),
        ),
        Claim(
            name="ablation at 7B, 2M context, 1024 GPUs",
            paper=(
                "dynamic communication 1.59x, + offloading 2.01x, + balance 3.69x, + remote loader "
                "3.89x"
            ),
            bar=(
                "ring bytes down by the short sequences' share of tokens; busiest over mean rank "
                "below 1.1"
            ),
        ),
    ),
)
