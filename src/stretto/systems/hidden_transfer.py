"""Hidden Transfer."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="hidden-transfer",
    title="Hidden Transfer",
    purpose=(
        "Mid-stack projections create pseudo hidden states of future tokens; the upper layers refine "
        "them and the same head reads them."
    ),
    paper=(
        "Parallel Decoding via Hidden Transfer for Lossless Large Language Model Acceleration, 18 Apr"
        " 2024 (arXiv 2404.12022)"
    ),
    claims=(
        Claim(
            "Several successive tokens per forward of one",
            (
                "Several successive tokens per forward of one model, lossless; better acceleration "
                "than all single-model methods compared, including Medusa and Self-Speculative "
                "decoding"
            ),
        ),
        Claim(
            "Reason given",
            (
                "Reason given: Medusa guesses future tokens from the final state of the last token "
                "with a small head; a pseudo state inserted lower in the stack passes through many "
                "real layers"
            ),
        ),
        Claim(
            "Analyses in the paper",
            (
                "Analyses in the paper: accuracy against the layer at which the transfer happens, for"
                " step 1 and step 2; similarity of pseudo and real hidden states, which grows in "
                "higher layers"
            ),
        ),
    ),
)
