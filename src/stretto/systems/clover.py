"""Clover: Medusa-like heads that know which tokens were guessed before them."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="clover",
    title="Clover",
    purpose="Medusa-like heads that know which tokens were guessed before them.",
    paper=(
        "Clover: Regressive Lightweight Speculative Decoding with Sequential Knowledge, 30 Apr 2024 "
        "(arXiv 2405.00263)"
    ),
    claims=(
        Claim(
            "Throughput up to +91 %",
            (
                "Throughput up to +91 % (Baichuan-Small 7B) and +146 % (Baichuan-Large >100B) over "
                "plain decoding; up to +37 % and +57 % points over Medusa"
            ),
        ),
        Claim(
            "Top-5 head accuracy +11.7 points at the",
            (
                "Top-5 head accuracy +11.7 points at the first head and +21.7..+26.4 at later ones "
                "versus Medusa: the gain grows with distance"
            ),
        ),
        Claim(
            "Made for large-batch serving",
            "Made for large-batch serving: tree of only 4 nodes",
        ),
    ),
)
