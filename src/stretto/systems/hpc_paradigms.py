"""Parallel paradigms: MPI, OpenMP and CUDA compared by measurement, and chosen by model."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="hpc-paradigms",
    title="Parallel paradigms",
    purpose="MPI, OpenMP and CUDA compared by measurement, and chosen by model.",
    paper=(
        "\"Parallel Paradigms in Modern HPC: A Comparative Analysis of MPI, OpenMP, and CUDA\" "
        "(ALHafez, Kurdi; arXiv 2506.15454, Jun 2025)"
    ),
    claims=(
        Claim(
            "MPI",
            (
                "MPI: distributed memory, near-linear scaling for communication-intensive "
                "applications, but communication overhead"
            ),
        ),
        Claim(
            "It is a survey without a benchmark",
            "It is a survey without a benchmark to copy",
        ),
    ),
)
