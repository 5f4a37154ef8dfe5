"""ATTS: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="atts",
    title="ATTS",
    room="threads",
    parts=("stretto.threads.atts", "stretto.threads.conformal", "stretto.threads.homes", "stretto.training.step_units"),
    command="stretto scale --method atts --draft zoo:tiny-steps-draft --target zoo:tiny-steps --questions steps:4",
    purpose=(
        "Gives many reasoning chains per question at little more than the draft's cost: the target "
        "scores chunks without a barrier and takes over a chosen share."
    ),
    paper=(
        "ATTS: Asynchronous Test-Time Scaling via Conformal Prediction, Sep 2025 (arXiv "
        "2509.15148, ICLR 2026)"
    ),
    claims=(
        Claim(
            name="speed against the target alone",
            paper="up to 56.7x faster, 4.14x throughput, no accuracy loss",
            bar=(
                "accuracy near the target's at a take-over share of 0.3-0.4, in well below the "
                "target's time"
            ),
        ),
        Claim(
            name="rejection rate",
            paper="held at its target",
            bar="equals floor(a(n+1))/(n+1) within 3 standard errors over 10^5 draws",
        ),
        Claim(
            name="synchronisation is the bottleneck",
            paper="ranking all candidates of a turn waits for the slowest",
            bar="asynchronous beats synchronous clearly in the simulator with heavy-tailed lengths",
        ),
    ),
)
