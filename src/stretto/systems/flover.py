"""Flover."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="flover",
    title="Flover",
    purpose=(
        "Fuse all requests in time: one token step for everyone, new requests slip in between steps, "
        "finished ones leave and the memory closes up."
    ),
    paper=(
        "Flover: A Temporal Fusion Framework for Efficient Autoregressive Model Parallel Inference, "
        "arXiv 2305.13484, 22 May 2023 (HiPC 2023)"
    ),
    claims=(
        Claim(
            "Over 11× on GPT-J and 16× on",
            (
                "Over 11× on GPT-J and 16× on LLaMA vs FasterTransformer serving requests that arrive"
                " over time; works with tensor parallelism"
            ),
        ),
        Claim(
            "Poisson table",
            (
                "Poisson table (32 requests × 512 iterations, one request alone 5.8 s; mean gap λ → "
                "total iterations, mean overlap, speed-up): 20 ms → 557, 91.3%, 11.2×"
            ),
        ),
        Claim(
            "Uneven lengths",
            (
                "Uneven lengths (uniform 128…max), LLaMA-13B: FasterTransformer 172.8 s / Flover "
                "without memory shuffle 24.8 / with 21.5 at max 512"
            ),
        ),
    ),
)
