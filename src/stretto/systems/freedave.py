"""FreeDave: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="freedave",
    title="FreeDave",
    room="decoding",
    purpose=(
        "Decodes diffusion models in fewer forwards with exactly the text of slow decoding, "
        "without training or a second model."
    ),
    paper=(
        "Free Draft-and-Verification: Toward Lossless Parallel Decoding for Diffusion Large "
        "Language Models, 30 Sep 2025"
    ),
    claims=(
        Claim(
            name="throughput",
            paper="up to 3.78x on maths and code (Dream, LLaDA, SDAR, TraDo)",
            bar=(
                "1.5-3x fewer forwards on copy-like and arithmetic text; 1.1-2x wall clock at "
                "batch 1, block 8"
            ),
        ),
        Claim(
            name="loss",
            paper="none",
            bar="text equals static decoding on every prompt, fp32",
        ),
        Claim(
            name="fewest forwards",
            paper="with enough memory, the fewest that reproduce the static sequence",
            bar="forwards never rise with the depth; equals the brute-force minimum",
        ),
    ),
)
