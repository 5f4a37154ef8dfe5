"""ByteScale: One pool of ranks for data and context parallelism; each sequence takes just the ranks it needs."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="bytescale",
    title="ByteScale",
    purpose="One pool of ranks for data and context parallelism; each sequence takes just the ranks it needs.",
    paper=(
        "\"ByteScale: Efficient Scaling of LLM Training with a 2048K Context Length on More Than "
        "12,000 GPUs\", arXiv 2502.21231, 28 Feb 2025 (SIGCOMM 2025 version: \"... on 16384 GPUs\")"
    ),
    claims=(
        Claim(
            "Up to 7.89x over MegaScale with static",
            (
                "Up to 7.89x over MegaScale with static DPxCP (LLaMA-7B..70B, Mistral MoE 8x7B and "
                "8x22B; 256K-2M context"
            ),
        ),
        Claim(
            "When context grows 2x the baseline loses",
            (
                "When context grows 2x the baseline loses about half its throughput, naive HDP 1.23x,"
                " balanced HDP 1.08x"
            ),
        ),
        Claim(
            "Ablation",
            (
                "Ablation (7B, 2M context, 1024 GPUs): dynamic communication 1.59x, + selective "
                "offloading 2.01x, + balance 3.69x, + remote loader 3.89x"
            ),
        ),
    ),
)
