"""QiMeng-MuPa: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="qimeng-mupa",
    title="QiMeng-MuPa",
    room="programs",
    purpose=(
        "Translates C++ to CUDA and back with unit tests that both sides pass, and trains itself "
        "on unpaired code."
    ),
    paper=(
        "QiMeng-MuPa: Mutual-Supervised Learning for Sequential-to-Parallel Code Translation, Jun "
        "2025 (arXiv 2506.11153, NeurIPS 2025)"
    ),
    claims=(
        Claim(
            name="Qwen2.5-Coder-7B, C++ to CUDA",
            paper="pass@1 56.24 to 85.15, compile pass 72.10 to 95.71",
            bar="pass@1 rises in rounds 1-2, more than with unfiltered back-translations",
        ),
        Claim(
            name="Qwen3-0.6B translator",
            paper="pass@1 11.59 to 84.44",
        ),
        Claim(
            name="tester",
            paper="+68.9 % valid tests; over 10 k verified functions",
            bar="validity and mutation score per round",
        ),
        Claim(
            name="rules",
            paper="CodeRosetta 0.8B 75.96 pass@1",
            bar=(
                "rule translator: compile pass 98 %, pass 90 % of 120 functions, the rest refused "
                "with a reason"
            ),
        ),
    ),
)
