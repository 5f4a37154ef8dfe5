"""MoE Parallel Folding: Give attention and expert layers their own device grid over the same ranks."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="moe-folding",
    title="MoE Parallel Folding",
    purpose="Give attention and expert layers their own device grid over the same ranks.",
    paper=(
        "\"MoE Parallel Folding: Heterogeneous Parallelism Mappings for Efficient Large-Scale MoE "
        "Model Training with Megatron Core\", arXiv 2504.14960, 21 Apr 2025 (v3 Mar 2026)"
    ),
    claims=(
        Claim(
            "bf16 MFU on H100",
            (
                "bf16 MFU on H100 (global batch 256, seq 4096, token dropping with capacity factor 1 "
                "so that imbalance does not blur the timing): Mixtral-8x22B on 128 GPUs: FSDP 4.3 %, "
                "FSDP+EP 23.4 %"
            ),
        ),
        Claim(
            "The gain is largest for fine-grained experts",
            (
                "The gain is largest for fine-grained experts (many small experts, large top-k), "
                "where expert tensor parallelism is worst"
            ),
        ),
        Claim(
            "Long context to 128K tokens on 1024",
            "Long context to 128K tokens on 1024 GPUs with a small MFU loss (Mixtral 47.6 -> 42.9 %)",
        ),
    ),
)
