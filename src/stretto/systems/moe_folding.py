"""MoE Parallel Folding: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="moe-folding",
    title="MoE Parallel Folding",
    room="parallel",
    purpose=(
        "Trains mixture-of-experts models faster by giving attention and experts their own grids "
        "over the same ranks."
    ),
    paper=(
        "MoE Parallel Folding: Heterogeneous Parallelism Mappings for Efficient Large-Scale MoE "
        "Model Training with Megatron Core, 21 Apr 2025 (arXiv 2504.14960)"
    ),
    claims=(
        Claim(
            name="Mixtral-8x22B on 128 H100s",
            paper="MFU 46.3 % to 49.3 % with folding; FSDP + EP 23.4 %",
            bar="simulator, 2 nodes of 8: the MoE layer is faster when experts stay in the node",
        ),
        Claim(
            name="Qwen2-57B-A14B on 64",
            paper="35.3 to 39.0 %",
        ),
        Claim(
            name="long context",
            paper="128K tokens on 1024 GPUs: 47.6 to 42.9 %",
        ),
        Claim(
            name="same mathematics",
            paper="any grid",
            bar="five grids on 4 processes: equal loss over 20 steps, 1e-4 relative",
        ),
    ),
)
