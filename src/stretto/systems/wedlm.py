"""WeDLM: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="wedlm",
    title="WeDLM",
    room="decoding",
    purpose=(
        "Decodes several tokens per forward under plain causal attention, so that each lands in "
        "the K/V cache at once."
    ),
    paper=(
        "WeDLM: Reconciling Diffusion Language Models with Standard Causal Attention for Fast "
        "Inference, Dec 2025 (arXiv 2512.22737)"
    ),
    claims=(
        Claim(
            name="speed against the AR model in vLLM",
            paper="about 3x on reasoning, up to 10x on counting-like text",
            bar=(
                "2-3 tokens a forward on arithmetic, 4 and more on counting; 1.3-2.5x at batch 1, "
                "gone at 16"
            ),
        ),
        Claim(
            name="quality",
            paper="base mean 67.21 to 70.84 (7B) and 72.61 to 74.72 (8B); small models lose",
            bar="a few points below the AR control at this size",
        ),
        Claim(
            name="streaming against block-wise",
            paper="up to 1.9x with the same model",
            bar="at least as fast at the same threshold",
        ),
    ),
)
