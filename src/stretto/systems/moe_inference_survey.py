"""MoE inference survey."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="moe-inference-survey",
    title="MoE inference survey",
    purpose="Its taxonomy as a checklist: every family gets one real, measured optimisation in the product.",
    paper=(
        "A Survey on Inference Optimization Techniques for Mixture of Experts Models, arXiv "
        "2412.14219, 18 Dec 2024 (ACM Computing Surveys)"
    ),
    claims=(
        Claim(
            "A survey",
            "A survey: no numbers of its own",
        ),
    ),
)
