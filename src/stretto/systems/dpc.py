"""DPC."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="dpc",
    title="DPC",
    purpose=(
        "Keep the tuned prompt for new classes, train a clone of it on hard negatives for the base "
        "classes, and mix the two per task."
    ),
    paper=(
        "\"DPC: Dual-Prompt Collaboration for Tuning Vision-Language Models\" (Mar 2025, CVPR 2025, "
        "arXiv 2503.13443)"
    ),
    claims=(
        Claim(
            "Base-to-new protocol",
            (
                "Base-to-new protocol (train on half of the classes, 16 shots, test on both halves), "
                "CLIP ViT-B/16, average of 11 datasets, base / new / harmonic mean H"
            ),
        ),
    ),
)
