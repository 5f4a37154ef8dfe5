"""MoE inference survey: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="moe-inference-survey",
    title="MoE inference survey",
    room="experts",
    purpose=(
        "Applies any of the surveyed optimisations to a mixture-of-experts model and tells what "
        "each costs and gains."
    ),
    paper=(
        "A Survey on Inference Optimization Techniques for Mixture of Experts Models, 18 Dec 2024 "
        "(arXiv 2412.14219, ACM Computing Surveys)"
    ),
    claims=(
        Claim(
            name="coverage",
            paper="three levels: model, system, hardware; the survey has no numbers of its own",
            bar="every family of the taxonomy has one measured optimisation",
        ),
        Claim(
            name="compression",
            paper="pruning, quantisation, distillation, low rank, merging",
            bar=(
                "int8 nearly free, int4 a small loss; merging beats pruning at high ratios on "
                "domain data"
            ),
        ),
        Claim(
            name="skipping and offloading",
            paper="adaptive gating; caching and prefetching of experts",
            bar=(
                "skipping cuts 20-40 % of expert calls for a small loss; the cache never exceeds "
                "its bytes"
            ),
        ),
    ),
)
