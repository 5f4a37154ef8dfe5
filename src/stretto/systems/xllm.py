"""xLLM and xLLM-Service."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="xllm",
    title="xLLM and xLLM-Service",
    purpose=(
        "A service layer that places, mixes and moves requests over stateless engines, and an engine "
        "that hides every bubble."
    ),
    paper="xLLM Technical Report, arXiv 2510.14686, 16 Oct 2025 (v2 Mar 2026)",
    claims=(
        Claim(
            "Same TPOT limit",
            (
                "Same TPOT limit, Ascend 910B/C: up to 1.7× MindIE and 2.2× vLLM-Ascend on Qwen2/3 "
                "(0.6B-32B, TPOT 50 ms, 2048 in / 2048 out); average 1.7× MindIE on DeepSeek-R1"
            ),
        ),
        Claim(
            "Ablations",
            (
                "Ablations (paper): SLO-aware dynamic PD 1.67× the served rate of \"minimal load\" on "
                "bursty Azure-Code, 1.1× on steady Azure-Conversation"
            ),
        ),
        Claim(
            "Code documentation",
            (
                "Code documentation: async scheduling leaves ~200 µs between steps; chunked prefill "
                "−46% TTFT (Qwen3-8B, TPOT 50 ms); zero-evict −27% TPOT; prefix cache −10% E2E"
            ),
        ),
    ),
)
