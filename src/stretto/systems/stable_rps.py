"""STABLE-RPS: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="stable-rps",
    title="STABLE-RPS",
    room="models",
    purpose=(
        "Trains a model of n weights from m < n shared numbers, stably, so that parameters, "
        "optimizer state and exchange shrink to m."
    ),
    paper="In defense of parameter sharing for model-compression, Oct 2023 (ICLR 2024)",
    claims=(
        Claim(
            name="against pruning at initialisation",
            paper="matches or beats it over the whole range of compression",
            bar="at least equal to pruning at init at the same stored numbers, 1-5M parameters",
        ),
        Claim(
            name="stability",
            paper="ROAST diverges or stalls with its memory's initial scale; fixed",
            bar="the loss does not depend on the scale from 1e-3 to 1",
        ),
        Claim(
            name="no compression",
            paper="recovers the original model",
            bar="keep = 1 equals dense training step by step, 1e-5",
        ),
    ),
)
