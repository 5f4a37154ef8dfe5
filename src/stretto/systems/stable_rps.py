"""STABLE-RPS."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="stable-rps",
    title="STABLE-RPS",
    purpose=(
        "A model whose n weights are all views (sign, scale) into m < n shared numbers, trained "
        "stably from scratch."
    ),
    paper=(
        "\"In defense of parameter sharing for model-compression\" (Oct 2023, ICLR 2024, Desai and "
        "Shrivastava)"
    ),
    claims=(
        Claim(
            "Randomised parameter sharing",
            (
                "Randomised parameter sharing (RPS), which needs no data and no pre-training, matches"
                " or beats smaller models and pruning at initialisation (random, MAG, SNIP, SYNFLOW"
            ),
        ),
        Claim(
            "ROAST has two faults",
            (
                "ROAST has two faults, both fixed provably: training diverges or stalls depending on "
                "the initialisation std of the shared memory (stability)"
            ),
        ),
        Claim(
            "Linear-model theory",
            (
                "Linear-model theory: a random shared representation preserves more of the function "
                "per stored number than pruning does"
            ),
        ),
    ),
)
