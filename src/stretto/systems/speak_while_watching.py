"""Speak While Watching."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="speak-while-watching",
    title="Speak While Watching",
    purpose=(
        "Streaming video narration with decoupled input and output positions, so perceiving and "
        "generating overlap."
    ),
    paper=(
        "Speak While Watching: Unleashing TRUE Real-Time Video Understanding Capability of Multimodal"
        " LLMs, Jan 2026 (arXiv 2601.06843)"
    ),
    claims=(
        Claim(
            "The obstacle to real input/output parallelism is",
            (
                "The obstacle to real input/output parallelism is global positional continuity: while"
                " output is being generated, the position of the next input token is unknown (and the"
                " reverse)"
            ),
        ),
        Claim(
            "Up to 2x acceleration when perception and",
            (
                "Up to 2x acceleration when perception and generation cost the same per interval; "
                "lower latency than interleaved streaming; fluency and accuracy kept (per-table "
                "figures not available)"
            ),
        ),
        Claim(
            "Forerunner's finding",
            (
                "Forerunner's finding (translation): letting input tokens attend to output tokens is "
                "what hurts; keeping relative order within the input and within the output matters"
            ),
        ),
    ),
)
