"""C4: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="c4",
    title="C4",
    room="parallel",
    purpose=(
        "Names the faulty rank or link of a hung or slow training job within seconds, and plans "
        "flows that do not collide."
    ),
    paper=(
        "Boosting Large-scale Parallel Training Efficiency with C4: A Communication-Driven "
        "Approach, Jun 2024 (arXiv 2406.04594, HPCA 2025)"
    ),
    claims=(
        Claim(
            name="overhead of errors",
            paper="cut by about 30 points of run time",
            bar=(
                "right class and culprit in 95 % of 50 injected faults, within 10 s, no false "
                "alarm in 10 minutes"
            ),
        ),
        Claim(
            name="run time of jobs with moderate communication",
            paper="about 15 % better",
            bar="recording costs at most 2 % of a step",
        ),
        Claim(
            name="eight concurrent jobs (from memory)",
            paper="172-263 Gb/s without planning, 354-361 with",
            bar="simulator: planned flows above 95 % of the bound, hashed ones lose 30-50 %",
        ),
    ),
)
