"""WeDLM: Diffusion decoding under plain causal attention, so every committed token is in the K/V cache at once."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="wedlm",
    title="WeDLM",
    purpose=(
        "Diffusion decoding under plain causal attention, so every committed token is in the K/V "
        "cache at once."
    ),
    paper=(
        "WeDLM: Reconciling Diffusion Language Models with Standard Causal Attention for Fast "
        "Inference, Dec 2025 (arXiv 2512.22737)"
    ),
    claims=(
        Claim(
            "From Qwen2.5-7B and Qwen3-8B by 100 B",
            (
                "From Qwen2.5-7B and Qwen3-8B by 100 B tokens of continued pre-training + SFT (paper "
                "text says 10 B in one place, 10 K pairs in another)"
            ),
        ),
        Claim(
            "Speed against the AR model in vLLM",
            (
                "Speed against the AR model in vLLM: about 3× on reasoning, up to 10× on counting-"
                "like text; per text kind 1673 / 745 / 198 tok/s (low / medium / high entropy)"
            ),
        ),
        Claim(
            "Streaming against block-wise decoding with the same",
            (
                "Streaming against block-wise decoding with the same model: up to 1.9× (423 vs 221 "
                "tok/s at τ .9)"
            ),
        ),
    ),
)
