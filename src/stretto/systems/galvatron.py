"""Galvatron: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="galvatron",
    title="Galvatron",
    room="planning",
    purpose=(
        "Finds how to cut a model over machines, layer by layer, within a memory budget, and "
        "predicts time and memory."
    ),
    paper=(
        "Galvatron: Automatic Distributed Training for Large Transformer Models, 2025 report; "
        "Galvatron, PVLDB 16, 2022 (arXiv 2211.13878)"
    ),
    claims=(
        Claim(
            name="against hand-made mixes",
            paper="better throughput than any fixed strategy",
            bar="the plan found is within 10 % of the best measured one",
        ),
        Claim(
            name="prediction",
            paper="a profiled cost model",
            bar=(
                "rank correlation above 0.8 over about 12 strategies, mean error below 25 %, "
                "memory within 15 %"
            ),
        ),
        Claim(
            name="search",
            paper="dynamic programming over layers and strategies",
            bar="equals brute force on small instances; more memory is never slower",
        ),
    ),
)
