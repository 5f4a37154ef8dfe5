"""DistZO2."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="distzo2",
    title="DistZO2",
    purpose=(
        "Spread zeroth-order fine-tuning over devices: one sign of the perturbation each, or one data"
        " shard each, or both, exchanging one number per step."
    ),
    paper=(
        "\"DistZO2: High-Throughput and Memory-Efficient Zeroth-Order Fine-tuning LLMs with "
        "Distributed Parallel Computing\" (Jul 2025, arXiv 2507.03211)"
    ),
    claims=(
        Claim(
            "3x the throughput of ZO2 on OPT-175B",
            "3x the throughput of ZO2 on OPT-175B with several GPUs (count (u): 4), same memory per GPU",
        ),
        Claim(
            "Same accuracy as MeZO with OPT-13B",
            "Same accuracy as MeZO with OPT-13B, batch 256: SST-2 91.4 and BoolQ 67.6 in both",
        ),
        Claim(
            "From the traces",
            (
                "From the traces: perturbation parallelism alone overlaps badly (one forward per "
                "upload is too little compute to hide the transfer); data parallelism (dual forward) "
                "overlaps well"
            ),
        ),
    ),
)
