"""Nexus."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="nexus",
    title="Nexus",
    purpose=(
        "Prefill and decode run at the same time on one device, with a share of it each that a "
        "contention-aware cost model chooses before trouble comes."
    ),
    paper=(
        "Proactive Intra-GPU Disaggregation of Prefill and Decode in LLM Serving (arXiv 2507.06608, 9"
        " Jul 2025; v2 title \"Taming Throughput-Latency Tradeoff in LLM Serving via Efficient GPU "
        "Sharing\")"
    ),
    claims=(
        Claim(
            "vs vLLM",
            (
                "vs vLLM: up to 2.2× throughput, 20× lower TTFT, 2.5× lower time between tokens "
                "(TBT); vs SGLang up to 2×; matches or beats vLLM with PD disaggregation on two GPUs"
            ),
        ),
        Claim(
            "Setting",
            "Setting: NVIDIA L20 48 GB, Qwen2.5-3B and Llama-3.1-8B (1 GPU), Qwen2.5-14B (2 GPUs)",
        ),
        Claim(
            "Motivation numbers",
            (
                "Motivation numbers: mean iteration 132 ms prefill-only, 15 ms decode-only, 251 ms "
                "mixed, and 94% of batches are mixed under chunked prefill"
            ),
        ),
    ),
)
