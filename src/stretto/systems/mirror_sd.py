"""Mirror-SD: The draft works on another device while the target finishes its upper layers."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="mirror-sd",
    title="Mirror-SD",
    purpose="The draft works on another device while the target finishes its upper layers.",
    paper=(
        "Mirror Speculative Decoding: Breaking the Serial Barrier in LLM Inference, 15 Oct 2025 "
        "(Apple, arXiv 2510.13161, v2 Dec 2025)"
    ),
    claims=(
        Claim(
            "2.8-5.8× wall-time speed-up on SpecBench tasks",
            (
                "2.8-5.8× wall-time speed-up on SpecBench tasks, targets of 14B-66B; 30 % average "
                "relative gain over EAGLE-3"
            ),
        ),
        Claim(
            "Setup",
            (
                "Setup: target tensor-parallel on 8 GPUs, draft on 8 NPUs, batch 1 first; gain "
                "remains to batch 64 with smaller settings"
            ),
        ),
        Claim(
            "Idea",
            (
                "Idea: plain speculation costs T_draft + T_target per step; here T = T_target(1..ℓ_e)"
                " + T_rv(early) + max(T_target(ℓ_e+1..N), T_draft(γ)) + T_rv(final)"
            ),
        ),
    ),
)
