"""ATTS."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="atts",
    title="ATTS",
    purpose=(
        "Many reasoning chains scaled asynchronously: a draft model writes, the target only scores "
        "each chunk, and a conformal test decides who continues."
    ),
    paper=(
        "ATTS: Asynchronous Test-Time Scaling via Conformal Prediction, Sep 2025 (arXiv 2509.15148, "
        "ICLR 2026; first version called A1)"
    ),
    claims=(
        Claim(
            "Up to 56.7x faster test-time scaling and",
            (
                "Up to 56.7x faster test-time scaling and 4.14x throughput against scaling the target"
                " model alone, no accuracy loss, rejection rate held at its target, on MATH, AMC23, "
                "AIME24/25"
            ),
        ),
        Claim(
            "Diagnosis",
            (
                "Diagnosis: with many chains over many turns the bottleneck is synchronization "
                "(ranking or softmax over all candidates of a turn makes everyone wait for the "
                "slowest)"
            ),
        ),
    ),
)
