"""Youtu-Parsing."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="youtu-parsing",
    title="Youtu-Parsing",
    purpose=(
        "Document parsing: one visual encoding, many region prompts, 64 verified candidate tokens per"
        " step, five boxes per query."
    ),
    paper=(
        "Youtu-Parsing: Perception, Structuring and Recognition via High-Parallelism Decoding, Jan "
        "2026 (arXiv 2601.20430, Tencent Youtu)"
    ),
    claims=(
        Claim(
            "Token parallelism",
            (
                "Token parallelism: up to 64 candidate tokens per step, verified: 5-11x over "
                "autoregressive decoding, best on tables"
            ),
        ),
        Claim(
            "State of the art on OmniDocBench v1.5",
            "State of the art on OmniDocBench v1.5 and olmOCR-bench (figures only in images; not copied)",
        ),
    ),
)
