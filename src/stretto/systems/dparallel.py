"""dParallel: Certainty-forcing distillation: make the model sure about many tokens at once."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="dparallel",
    title="dParallel",
    purpose="Certainty-forcing distillation: make the model sure about many tokens at once.",
    paper="dParallel: Learnable Parallel Decoding for dLLMs, 30 Sep 2025 (ICLR 2026)",
    claims=(
        Claim(
            "LLaDA-8B-Instruct",
            "LLaDA-8B-Instruct, 256 tokens, blocks of 32, no cache",
        ),
        Claim(
            "Dream-7B",
            "Dream-7B: GSM8K 39 / 6.9× / 82.1 (82.9)",
        ),
        Claim(
            "A \"consistency distillation\" baseline at 64 steps",
            (
                "A \"consistency distillation\" baseline at 64 steps does much worse (LLaDA GSM8K 69.9,"
                " HumanEval 19.5)"
            ),
        ),
    ),
)
