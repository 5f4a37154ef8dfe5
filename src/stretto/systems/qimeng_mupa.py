"""QiMeng-MuPa: A Translator and a Tester that supervise each other for C++ <-> CUDA."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="qimeng-mupa",
    title="QiMeng-MuPa",
    purpose="A Translator and a Tester that supervise each other for C++ <-> CUDA.",
    paper=(
        "\"QiMeng-MuPa: Mutual-Supervised Learning for Sequential-to-Parallel Code Translation\" (Ke et"
        " al., arXiv 2506.11153, Jun 2025; NeurIPS 2025; earlier name MuSL)"
    ),
    claims=(
        Claim(
            "C++ → CUDA on the BabelTower test",
            "C++ → CUDA on the BabelTower test pairs (180 pairs",
        ),
    ),
)
