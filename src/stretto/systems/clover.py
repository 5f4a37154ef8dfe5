"""Clover: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="clover",
    title="Clover",
    room="decoding",
    purpose=(
        "Speeds up serving at medium batch: light drafting heads that know which tokens were "
        "guessed before them."
    ),
    paper=(
        "Clover: Regressive Lightweight Speculative Decoding with Sequential Knowledge, 30 Apr "
        "2024 (arXiv 2405.00263)"
    ),
    claims=(
        Claim(
            name="throughput over plain decoding",
            paper="up to +91 % (7B) and +146 % (>100B)",
            bar=(
                "1.2-1.8x at batch 1, 1.0-1.3x at batch 8; the curve over the batch is the "
                "reproduction"
            ),
        ),
        Claim(
            name="throughput over Medusa",
            paper="up to +37 and +57 percentage points",
        ),
        Claim(
            name="accuracy of the heads",
            paper="top-5 +11.7 points over Medusa at the first head, +21.7 to +26.4 at later ones",
            bar="+10 points at heads 2-3 where the order of guesses matters",
        ),
        Claim(
            name="made for small trees",
            paper="gains at large batch with a tree of 4 nodes",
        ),
    ),
)
