"""ExFlow."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="exflow",
    title="ExFlow",
    purpose=(
        "Tokens stay where their expert was: one all-to-all per MoE layer, and experts placed so that"
        " the next expert is usually already there."
    ),
    paper=(
        "Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model Inference, "
        "arXiv 2401.08383, 16 Jan 2024 (IPDPS 2024)"
    ),
    claims=(
        Claim(
            "Up to 67% less cross-GPU routing latency",
            (
                "Up to 67% less cross-GPU routing latency, up to 2.2× throughput over DeepSpeed-MoE "
                "on pre-trained GPT MoE models with 8-64 experts (top-1"
            ),
        ),
        Claim(
            "No fine-tuning",
            "No fine-tuning, no accuracy change",
        ),
        Claim(
            "During training",
            (
                "During training: apparent affinity very high in the first ~200 steps (collapsed "
                "routing), falls until ~2000 while balancing acts, then rises and stabilises"
            ),
        ),
    ),
)
