"""OneFlow: SBP placements decide how tensors are cut; actors with counted registers run the result."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="oneflow",
    title="OneFlow",
    purpose="SBP placements decide how tensors are cut; actors with counted registers run the result.",
    paper=(
        "\"OneFlow: Redesign the Distributed Deep Learning Framework from Scratch\", arXiv 2110.15032, "
        "Oct 2021 (v2022)"
    ),
    claims=(
        Claim(
            "One abstraction",
            (
                "One abstraction, SBP (Split, Broadcast, Partial-value), expresses data, tensor, "
                "vocabulary and hybrid parallelism with a line per tensor; a compiler inserts the "
                "communication (\"boxing\")"
            ),
        ),
    ),
)
