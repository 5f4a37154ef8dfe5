"""ParEVO: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="parevo",
    title="ParEVO",
    room="programs",
    purpose=(
        "Turns a slow serial function on irregular data into a correct, race-checked parallel one, "
        "or says that none pays."
    ),
    paper=(
        "ParEVO: Synthesizing Code for Irregular Data: High-Performance Parallelism through "
        "Agentic Evolution, Mar 2026 (arXiv 2603.02510, ICML 2026)"
    ),
    claims=(
        Claim(
            name="ParEval",
            paper="106x on average, at most 1103x, against serial baselines on up to 64 cores",
            bar=(
                "geometric mean 1.6-1.9x at 2 threads on compute-bound tasks, parallel and "
                "algorithmic factors apart"
            ),
        ),
        Claim(
            name="graph problems",
            paper="13.6x",
        ),
        Claim(
            name="against expert kernels",
            paper="up to 4.1x over PBBS on some, losses on others",
        ),
        Claim(
            name="correctness",
            paper="gated by compiler, race detector and profiler",
            bar=(
                "90 % of 70 tasks correct and free of races by rules alone; carried dependences "
                "stay serial"
            ),
        ),
    ),
)
