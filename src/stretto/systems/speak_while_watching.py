"""Speak While Watching: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="speak-while-watching",
    title="Speak While Watching",
    room="multimodal",
    purpose=(
        "Lets a model narrate while frames keep arriving: perceiving and writing overlap in one "
        "forward."
    ),
    paper=(
        "Speak While Watching: Unleashing TRUE Real-Time Video Understanding Capability of "
        "Multimodal LLMs, Jan 2026 (arXiv 2601.06843)"
    ),
    claims=(
        Claim(
            name="acceleration",
            paper="up to 2x when perceiving and writing cost the same",
            bar="1.6-1.9x over interleaved streaming near balance, 1 at the extremes",
        ),
        Claim(
            name="quality",
            paper="group-decoupled positions keep fluency and accuracy best",
            bar="group near offline accuracy; gap and overlap behind it",
        ),
        Claim(
            name="delay",
            paper="lower than interleaved streaming",
            bar="p50 and p95 from a frame's arrival to its last token",
        ),
    ),
)
