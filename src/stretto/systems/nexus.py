"""Nexus: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="nexus",
    title="Nexus",
    room="engine",
    purpose=(
        "Keeps the cadence of running chats steady while long prompts come in: prefill and decode "
        "share one device by a cost model."
    ),
    paper=(
        "Proactive Intra-GPU Disaggregation of Prefill and Decode in LLM Serving, 9 Jul 2025 "
        "(arXiv 2507.06608)"
    ),
    claims=(
        Claim(
            name="against vLLM",
            paper=(
                "up to 2.2x throughput, 20x lower time to first token, 2.5x lower time between "
                "tokens"
            ),
            bar="lower tail of time between tokens than chunked and unchunked prefill",
        ),
        Claim(
            name="against SGLang",
            paper="up to 2x throughput",
        ),
        Claim(
            name="ablation",
            paper=(
                "repartitioning -14 % between tokens; shortest prompt first -90 % to first token; "
                "both better still"
            ),
            bar=(
                "shortest prompt first cuts the mean time to first token several-fold for mixed "
                "lengths"
            ),
        ),
        Claim(
            name="cost model",
            paper="chooses shares before trouble comes",
            bar="fit error at most 15-20 % on a quiet machine",
        ),
    ),
)
