"""SpecMemo."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="specmemo",
    title="SpecMemo",
    purpose=(
        "Speculative decoding inside a memory budget: model the footprint, then give every part just "
        "what it needs."
    ),
    paper="SpecMemo: Speculative Decoding is in Your Pocket, 16 May 2025 (arXiv 2506.01986; Yildirim, Chen)",
    claims=(
        Claim(
            "A device-aware engine that models the memory",
            (
                "A device-aware engine that models the memory of speculative decoding, derives a "
                "lower bound of the budget at which the speed-up is kept"
            ),
        ),
        Claim(
            "One Titan RTX",
            (
                "One Titan RTX (24 GB), MT-Bench: 96 % of the throughput of unrestricted speculative "
                "decoding with 65 % less generation memory (everything beyond the weights)"
            ),
        ),
        Claim(
            "Llama-2-70B-Chat spread over eight AMD MI250",
            (
                "Llama-2-70B-Chat spread over eight AMD MI250, with batched speculative decoding "
                "(earlier tree code is batch 1): 2× over distributed batched plain decoding; "
                "throughput ×8 at batch 10"
            ),
        ),
    ),
)
