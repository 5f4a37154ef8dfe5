"""Speculative MoE (s-MoE, later Sem-MoE)."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="speculative-moe",
    title="Speculative MoE (s-MoE, later Sem-MoE)",
    purpose=(
        "Guess from the token id where a token's experts will be, and co-place tokens and experts "
        "before the gate speaks."
    ),
    paper=(
        "Speculative MoE: Communication Efficient Parallel MoE Inference with Speculative Token and "
        "Expert Pre-scheduling, arXiv 2503.04398, 6 Mar 2025"
    ),
    claims=(
        Claim(
            "v1",
            (
                "v1: on DeepSpeed-MoE and SGLang, up to 4.3× end-to-end throughput under SLO on fast "
                "homogeneous and slow heterogeneous links (from a summary; unverified in detail)"
            ),
        ),
        Claim(
            "v3",
            (
                "v3 (8 GPUs, DeepSeek-V2-Lite 64 experts, Qwen3-30B-A3B 128 experts, fixed lengths, "
                "SLO = 5 × lightest-load latency): attention-DP throughput +31% (TTFT SLO) / up to "
                "2.21-2.78× (E2E SLO"
            ),
        ),
        Claim(
            "EP communication is up to 59% of",
            "EP communication is up to 59% of MoE-layer time on 8 GPUs",
        ),
    ),
)
