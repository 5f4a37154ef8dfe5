"""Learn2PD."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="learn2pd",
    title="Learn2PD",
    purpose=(
        "A 2 k-parameter filter learns which predictions are already final; EoTP stops at the end of "
        "the text."
    ),
    paper=(
        "Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive (v2: "
        "Learnable) Parallel Decoding, 29 Sep 2025"
    ),
    claims=(
        Claim(
            "LLaDA-8B-Instruct",
            (
                "LLaDA-8B-Instruct: up to 22.58× with no loss (long generation, 1024 tokens, GSM8K, "
                "Learn2PD + EoTP), 57.51× with a K/V cache (dual cache)"
            ),
        ),
        Claim(
            "Two observations",
            (
                "Two observations: (a) in low-confidence remasking most tokens are predicted "
                "correctly many steps before they are unmasked (often more than 10 repeated correct "
                "predictions);"
            ),
        ),
        Claim(
            "Oracle \"Extremely Greedy Parallel\"",
            (
                "Oracle \"Extremely Greedy Parallel\" (EGP): if every position were unmasked the first "
                "time its prediction equals the final text, speed-ups of more than an order of "
                "magnitude would come for free"
            ),
        ),
    ),
)
