"""CD4LM: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="cd4lm",
    title="CD4LM",
    room="training",
    purpose=(
        "Makes a diffusion model keep its accuracy at several tokens per forward, by distilling it "
        "so that long jumps are safe."
    ),
    paper=(
        "CD4LM: Consistency Distillation and aDaptive Decoding for Diffusion Language Models, 5 "
        "Jan 2026"
    ),
    claims=(
        Claim(
            name="GSM8K, LLaDA-8B-Instruct",
            paper="77.4 to 77.6 % at 5.18x wall clock",
            bar=(
                "1.2-2x the base's tokens per forward at equal accuracy, threshold decoding, 3 "
                "seeds"
            ),
        ),
        Claim(
            name="code",
            paper="HumanEval 38.7 to 40.9 at 3.30x; MBPP 36.9 to 39.0 at 2.96x",
        ),
        Claim(
            name="mean over its whole set",
            paper="3.62x against one token per step",
        ),
        Claim(
            name="the training matters",
            paper="one clean law for every noisy state lets the student skip steps",
            bar="more than plain fine-tuning with the same number of forwards gives",
        ),
    ),
)
