"""DES: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="des",
    title="DES",
    room="experts",
    purpose=(
        "Speeds up mixture-of-experts diffusion models: the tokens of a block share one small set "
        "of experts."
    ),
    paper=(
        "Dynamic Expert Sharing: Decoupling Memory from Parallelism in Mixture-of-Experts "
        "Diffusion LLMs, 31 Jan 2026 (arXiv 2602.00879)"
    ),
    claims=(
        Claim(
            name="distinct experts",
            paper="more than 55 % fewer",
            bar="the sweep over budgets shows distinct experts, kept mass and accuracy",
        ),
        Claim(
            name="latency",
            paper="up to 38 % lower",
            bar="synthetic LLaDA-MoE-shaped layer; none expected where experts sit in cache",
        ),
        Claim(
            name="accuracy",
            paper="99 % kept, without training",
            bar=(
                "DES-Vote best at small budgets, ahead of a reduced top-k with as many distinct "
                "experts"
            ),
        ),
    ),
)
