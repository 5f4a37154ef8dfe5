"""FreeDave."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="freedave",
    title="FreeDave",
    purpose=(
        "Lossless parallel decoding for diffusion LMs: draft from the same logits, verify in the next"
        " forward."
    ),
    paper=(
        "Free Draft-and-Verification: Toward Lossless Parallel Decoding for Diffusion Large Language "
        "Models, 30 Sep 2025"
    ),
    claims=(
        Claim(
            "Throughput up to 3.78× without loss on",
            (
                "Throughput up to 3.78× without loss on maths and code, for Dream, LLaDA, SDAR, "
                "TraDo; no training, no extra model"
            ),
        ),
        Claim(
            "Threshold decoding as comparison is lossy",
            (
                "Threshold decoding as comparison is lossy; at temperature 0.1 (the setting of "
                "earlier work) it loses a lot, at 0 little"
            ),
        ),
    ),
)
