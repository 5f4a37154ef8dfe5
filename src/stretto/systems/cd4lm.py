"""CD4LM: Distil a diffusion LM so that long jumps are safe, then decode as many tokens as confidence allows."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="cd4lm",
    title="CD4LM",
    purpose="Distil a diffusion LM so that long jumps are safe, then decode as many tokens as confidence allows.",
    paper="CD4LM: Consistency Distillation and aDaptive Decoding for Diffusion Language Models, 5 Jan 2026",
    claims=(
        Claim(
            "Teacher and start",
            "Teacher and start: LLaDA-8B-Instruct",
        ),
        Claim(
            "Reason given",
            (
                "Reason given: training on single random noise levels never shows the model the "
                "irregular states that an adaptive decoder visits (static-to-dynamic mismatch)"
            ),
        ),
    ),
)
