"""SpecMemo: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="specmemo",
    title="SpecMemo",
    room="planning",
    purpose=(
        "Runs speculative decoding inside a memory budget: tree, heads, batch and context are "
        "chosen so that it never runs out."
    ),
    paper="SpecMemo: Speculative Decoding is in Your Pocket, 16 May 2025 (arXiv 2506.01986)",
    claims=(
        Claim(
            name="MT-Bench, 24 GB",
            paper="96 % of the throughput with 65 % less generation memory",
            bar=(
                "60 % less at 95 % of the naive plan's throughput; 10-30 % less than paged K/V "
                "without smaller trees"
            ),
        ),
        Claim(
            name="Llama-2-70B over eight MI250",
            paper="2x over distributed batched plain decoding; x8 at batch 10",
            bar="x3-8 from batch 1 to 10",
        ),
        Claim(
            name="the budget holds",
            paper="a lower bound at which the speed-up is kept",
            bar=(
                "peak at most the budget in 10^3 random workloads; one block below the bound is "
                "refused at start"
            ),
        ),
    ),
)
