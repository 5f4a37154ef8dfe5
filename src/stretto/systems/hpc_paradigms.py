"""Parallel paradigms: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="hpc-paradigms",
    title="Parallel paradigms",
    room="programs",
    purpose=(
        "Says whether MPI, OpenMP, CUDA or a mix will pay for a program on a machine, and checks "
        "the advice by measurement."
    ),
    paper=(
        "Parallel Paradigms in Modern HPC: A Comparative Analysis of MPI, OpenMP, and CUDA "
        "(ALHafez, Kurdi), Jun 2025 (arXiv 2506.15454)"
    ),
    claims=(
        Claim(
            name="MPI",
            paper="near-linear scaling on distributed memory, at a cost in communication",
            bar=(
                "2 ranks within 10-15 % of OpenMP on pi, n-body and heat; slower on small "
                "histograms"
            ),
        ),
        Claim(
            name="OpenMP",
            paper="easy for loops on shared memory, limited by memory contention",
            bar=(
                "1.6-2.0x with 2 threads on compute-bound kernels, 1.2-1.8x on bandwidth-bound ones"
            ),
        ),
        Claim(
            name="recommendation",
            paper="hybrids are often best on heterogeneous machines",
            bar=(
                "median prediction error at most 20 %; chosen at most 1.1 times the best in 85 % "
                "of unseen cases"
            ),
        ),
    ),
)
