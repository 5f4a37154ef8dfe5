"""ParScale: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="parscale",
    title="ParScale",
    room="models",
    purpose=(
        "Gets better answers from the same weights: several prefixed copies of an input share each "
        "weight read and are mixed."
    ),
    paper="Parallel Scaling Law for Language Models, May 2025 (arXiv 2505.10475)",
    claims=(
        Claim(
            name="law",
            paper=(
                "P streams act like O(log P) more parameters: L = E + (A / (N (k ln P + 1)))^alpha"
            ),
            bar="refitted on a grid of small runs",
        ),
        Claim(
            name="1.6B, P = 8",
            paper="39.1 on HumanEval and MBPP, near a 4.4B (39.2); P = 1: 33.9",
            bar="P = 2 below P = 1 in loss at the same steps, also at equal compute",
        ),
        Claim(
            name="cost",
            paper=(
                "up to 22x less extra memory and 6x less extra latency than more parameters, batch "
                "1"
            ),
            bar="tokens a second nearly flat up to P = 8 at batch 1",
        ),
        Claim(
            name="two stages, GSM8K",
            paper="28.7 to 32.6 / 34.7 / 38.4 for P = 2 / 4 / 8",
            bar="with a frozen backbone the loss falls below the backbone's",
        ),
    ),
)
