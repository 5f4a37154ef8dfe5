"""Holmes: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="holmes",
    title="Holmes",
    room="planning",
    purpose=(
        "Trains over clusters with different networks at close to one fast network's speed: each "
        "pattern of communication goes where it fits."
    ),
    paper=(
        "Holmes: Towards Distributed Training Across Clusters with Heterogeneous NIC Environment, "
        "Dec 2023 (arXiv 2312.03549, ICPP 2024)"
    ),
    claims=(
        Claim(
            name="mixed networks",
            paper=(
                "close to a homogeneous RDMA cluster, far above Ethernet (GPT 3.6B-39B, up to 96 "
                "A100s)"
            ),
            bar=(
                "simulator: InfiniBand > RoCE > hybrid > Ethernet, hybrid within 25-30 % of "
                "InfiniBand"
            ),
        ),
        Claim(
            name="GPT-3.6B on 4 nodes (from memory)",
            paper="197 TFLOPS InfiniBand, 160 RoCE, 122 Ethernet, 149 hybrid",
            bar="real run: bytes over the slow link and step time fall as the simulator predicts",
        ),
        Claim(
            name="self-adapting pipeline partition",
            paper="stages sized by the speed of their machines",
            bar="beats the even split when speeds differ",
        ),
    ),
)
