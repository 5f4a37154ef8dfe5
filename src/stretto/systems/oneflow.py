"""OneFlow: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="oneflow",
    title="OneFlow",
    room="parallel",
    purpose=(
        "Cuts a model over devices with one line per tensor, inserts the communication, and never "
        "outruns its memory."
    ),
    paper=(
        "OneFlow: Redesign the Distributed Deep Learning Framework from Scratch, Oct 2021 (arXiv "
        "2110.15032)"
    ),
    claims=(
        Claim(
            name="one abstraction",
            paper="split, broadcast, partial-value express data, tensor and hybrid parallelism",
            bar=(
                "every pair of placements on 2 and 4 processes converts exactly, with the bytes of "
                "the table"
            ),
        ),
        Claim(
            name="speed",
            paper="matches or beats Megatron-LM, DeepSpeed and HugeCTR (ratios unverified)",
            bar="automatic placement equals brute force on graphs of up to 6 operators",
        ),
        Claim(
            name="actors with counted registers",
            paper="data dependency and memory limits in one mechanism",
            bar="never more than the given slots alive; 2 slots overlap where 1 is sequential",
        ),
    ),
)
