"""Holmes: Put each communication pattern on the network that can carry it, across clusters with different NICs."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="holmes",
    title="Holmes",
    purpose=(
        "Put each communication pattern on the network that can carry it, across clusters with "
        "different NICs."
    ),
    paper=(
        "\"Holmes: Towards Distributed Training Across Clusters with Heterogeneous NIC Environment\", "
        "arXiv 2312.03549, Dec 2023 (v4 Apr 2024; ICPP 2024, Zhejiang Lab)"
    ),
    claims=(
        Claim(
            "Training GPT models",
            (
                "Training GPT models (3.6B - 39B, up to 96 A100s) over nodes that have InfiniBand, "
                "RoCE, or only Ethernet between clusters gets close to a homogeneous RDMA cluster and"
                " far above pure Ethernet"
            ),
        ),
        Claim(
            "Table quoted from memory",
            (
                "Table quoted from memory (unverified): GPT-3.6B on 4 nodes: InfiniBand 197 TFLOPS "
                "per GPU / 99.2 samples/s, RoCE 160 / 80.5, Ethernet 122 / 61.3, hybrid with Holmes "
                "149 / 74.9"
            ),
        ),
        Claim(
            "Four ingredients",
            (
                "Four ingredients: cross-cluster pipeline parallelism, automatic NIC selection, self-"
                "adapting pipeline partition, overlapped distributed optimizer"
            ),
        ),
    ),
)
