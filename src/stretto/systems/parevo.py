"""ParEVO: Evolve fast, race-free parallel code for irregular data."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="parevo",
    title="ParEVO",
    purpose="Evolve fast, race-free parallel code for irregular data.",
    paper=(
        "\"ParEVO: Synthesizing Code for Irregular Data: High-Performance Parallelism through Agentic "
        "Evolution\" (Yang, Nie, Liu, Zou, Altınbüken, Yazdanbakhsh, Q. Liu; arXiv 2603.02510, Mar "
        "2026; ICML'26 poster)"
    ),
    claims=(
        Claim(
            "Three parts",
            (
                "Three parts: Parlay-Instruct corpus (13,820 verified tasks), fine-tuned "
                "DeepSeek-6.7B / Qwen3-30B / Gemini-2.5-Pro, and an Evolutionary Coding Agent (ECA) "
                "fed by compiler"
            ),
        ),
        Claim(
            "ParEval",
            (
                "ParEval: average 106x speedup (max 1103x) over the suite, 13.6x on graph problems; "
                "up to 4.1x over expert PBBS kernels on some irregular ones (their own comparison "
                "tables also contain losses"
            ),
        ),
    ),
)
