"""ParScale."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="parscale",
    title="ParScale",
    purpose=(
        "Run P copies of every input through one model, told apart by learned prefixes, and mix the P"
        " outputs with a learned gate."
    ),
    paper="\"Parallel Scaling Law for Language Models\" (May 2025, arXiv 2505.10475)",
    claims=(
        Claim(
            "A model with P streams behaves like",
            "A model with P streams behaves like one with O(log P) more parameters",
        ),
        Claim(
            "1.6B",
            (
                "1.6B, P=8 matches roughly a 4.4B on HumanEval/MBPP average (39.1 versus 39.2, P=1 "
                "1.6B: 33.9)"
            ),
        ),
        Claim(
            "Up to 22x less extra memory and",
            (
                "Up to 22x less extra memory and 6x less extra latency than growing the parameters "
                "for the same loss at batch 1; the advantage shrinks with batch (P·batch becomes "
                "compute bound)"
            ),
        ),
    ),
)
