"""Hidden Transfer: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="hidden-transfer",
    title="Hidden Transfer",
    room="decoding",
    purpose=(
        "Finishes several tokens per forward of one model, losslessly: small matrices in mid-stack "
        "make pseudo states of future tokens that the upper layers refine."
    ),
    paper=(
        "Parallel Decoding via Hidden Transfer for Lossless Large Language Model Acceleration, 18 "
        "Apr 2024 (arXiv 2404.12022)"
    ),
    claims=(
        Claim(
            name="against other single-model methods",
            paper="faster than all compared, Medusa and self-speculation included",
            bar="1.5-2.3 tokens a step and 1.2-1.7x wall clock at batch 1 on templated data",
        ),
        Claim(
            name="better guesses than final-state heads",
            paper="the more so for the second and third future token",
            bar="agreement at steps 2-3 above Medusa's by several points at middle entry layers",
        ),
        Claim(
            name="pseudo states become real",
            paper="similarity to real hidden states grows in higher layers",
            bar="cosine grows with depth; hiding step 1 from step 2 costs a few points",
        ),
        Claim(
            name="successor FIRP",
            paper="1.9-3x over plain decoding",
        ),
    ),
)
