"""Galvatron: Search a hybrid-parallel strategy per layer with a profiled cost model and dynamic programming."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="galvatron",
    title="Galvatron",
    purpose="Search a hybrid-parallel strategy per layer with a profiled cost model and dynamic programming.",
    paper=(
        "\"Galvatron: Automatic Distributed Training for Large Transformer Models\" (2025 report, one "
        "author)"
    ),
    claims=(
        Claim(
            "Automatic choice",
            (
                "Automatic choice, layer by layer, among data parallel (DDP / ZeRO-2 / ZeRO-3), "
                "tensor parallel + sequence parallel, Ulysses sequence parallel, pipeline (GPipe, "
                "1F1B-flush), activation checkpointing"
            ),
        ),
        Claim(
            "Three parts",
            (
                "Three parts: profiler (hardware + model), search engine, runtime that can switch the"
                " layout between two layers"
            ),
        ),
    ),
)
